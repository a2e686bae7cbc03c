"""minisa: a compact inference engine for Llama and Mistral checkpoints with Shared Attention (arXiv 2407.12866)."""

from minisa.engine import LLM, load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan

__all__ = ["LLM", "MinisaError", "SharingPlan", "load"]
