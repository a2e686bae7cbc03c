from minisa.cli import main
from minisa.console import run

run(main)
