"""Models by name: what models.toml lists, and what of it is on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minisa.benchmark.presets import PRESETS
from minisa.costs import parameter_count
from minisa.errors import MinisaError
from minisa.models import registry as registry_module
from minisa.models.registry import (
    DEFAULT_MODEL,
    WHEEL,
    ModelEntry,
    choose_plan,
    find,
    local_path,
    registry,
    resolve,
    weights_dir,
)
from minisa.sharing import SharingPlan
from minisa.text.chat import FORMATS


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models lie in a folder of the test's."""
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


class TestModelsToml:
    @pytest.mark.parametrize("entry", registry().values(), ids=lambda entry: entry.name)
    def test_an_entry_fits_the_model_it_names(self, entry: ModelEntry) -> None:
        assert re.fullmatch(r"[a-z0-9.-]+", entry.name)
        assert entry.homepage.startswith("https://") and entry.licence
        assert entry.chat is None or entry.chat in FORMATS
        shape = PRESETS[re.sub(r"-(chat|instruct)", "", entry.name)]
        if entry.sa is not None:
            assert choose_plan("default", shape, entry).followers
        files = {file.name: file for file in entry.files}
        assert len(files) == len(entry.files) and all(re.fullmatch(r"\w[\w.-]*", name) for name in files)
        assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in entry.files if file.sha256 is not None)
        pinned = [file.size for file in entry.files if file.size]
        assert not pinned or sum(pinned) == entry.size
        if entry.source.startswith(WHEEL):
            assert re.fullmatch(r"wheel:[\w-]+==[\d.]+", entry.source)
            assert all(file.sha256 and file.size for file in entry.files)  # there is no server to state them
            return
        assert re.fullmatch(r"https://huggingface\.co/\S+/resolve/[0-9a-f]{40}/", entry.source)  # main may change
        assert entry.size == pytest.approx(2 * parameter_count(shape, SharingPlan.none(shape.n_layers)), rel=1e-3)
        assert "config.json" in files and files.keys() & {"tokenizer.model", "tokenizer.json"}
        assert files.keys() & {"model.safetensors", "model.safetensors.index.json"}

    @pytest.mark.parametrize(
        "text", ["x = [", "x = 3", "[x]\nfiles = []", '[x]\ncolour = "red"\nfiles = []', "[x]\nsize = 1"]
    )
    def test_a_mistake_is_one_line_that_names_the_file(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "models.toml").write_text(text)
        monkeypatch.setattr(registry_module, "SHIPPED", tmp_path)
        with pytest.raises(MinisaError, match=f"^{re.escape(str(tmp_path))}/models.toml: "):
            registry.__wrapped__()

    def test_an_unknown_model_gets_similar_names(self) -> None:
        assert find("SmolLM2-135M").name == "smollm2-135m"
        with pytest.raises(MinisaError, match=r"unknown model 'llama3-8b-instuct': did you mean llama3-8b-instruct"):
            find("llama3-8b-instuct")
        with pytest.raises(MinisaError, match=r"unknown model 'zzzz': `python -m minisa models`"):
            find("zzzz")


class TestOnThisMachine:
    def test_where_models_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        monkeypatch.setenv("MINISA_WEIGHTS", "~/models")
        assert weights_dir() == Path("/home/someone/models")
        monkeypatch.delenv("MINISA_WEIGHTS")
        assert weights_dir() == Path(__file__).parents[1] / "weights"
        monkeypatch.setattr(registry_module, "SHIPPED", tmp_path / "minisa")  # in an installed wheel
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert weights_dir() == Path("/home/someone/.cache/minisa")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert weights_dir() == tmp_path / "minisa"

    def test_a_model_is_there_when_its_files_and_its_shards_are(self, weights: Path) -> None:
        entry = find("llama2-7b-chat")
        folder = weights / entry.name
        folder.mkdir(parents=True)
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        index = {"weight_map": {f"layer.{number}": shard for number, shard in enumerate(shards * 2)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("config.json", "tokenizer.model", *shards):
            assert local_path(entry) is None
            (folder / name).touch()
        assert local_path(entry) == folder
        for broken in ({}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../a.safetensors"}}):
            (folder / "model.safetensors.index.json").write_text(json.dumps(broken))
            with pytest.raises(MinisaError, match=r"index\.json: expected a weight_map of plain file names"):
                local_path(entry)

    @pytest.fixture
    def default_file(self, weights: Path) -> Path:
        """Where the default model's file lies: of the right size, with nothing in it."""
        file = find(DEFAULT_MODEL).files[0]
        path = weights / DEFAULT_MODEL / file.name
        path.parent.mkdir(parents=True)
        with path.open("wb") as sparse:
            sparse.truncate(file.size)
        return path

    def test_a_name_or_the_path_of_a_model_that_is_there(
        self, default_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entry = find(DEFAULT_MODEL)
        assert resolve("SmolLM2-135M") == resolve(str(default_file)) == (default_file, entry)
        monkeypatch.chdir(tmp_path)
        (tmp_path / DEFAULT_MODEL).mkdir()  # does not hide the model
        assert resolve(DEFAULT_MODEL) == (default_file, entry)
        assert resolve(f"./{DEFAULT_MODEL}") == (Path(DEFAULT_MODEL), None)
        with default_file.open("ab") as file:
            file.write(b"x")
        with pytest.raises(MinisaError, match=f"{DEFAULT_MODEL} is not in .* yet: run `python -m minisa pull"):
            resolve(DEFAULT_MODEL)

    def test_what_looks_like_a_path_is_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine").mkdir()
        (tmp_path / "sha256-0123").touch()  # a GGUF file in a store of blobs
        (tmp_path / "mine.gguf").touch()
        for name in ("mine", "./mine", "mine.gguf", "sha256-0123", str(tmp_path / "mine")):
            assert resolve(name) == (Path(name), None)
        assert resolve("~/mine") == (tmp_path / "mine", None)
        for missing in ("./smollm2-135m", "other.gguf", "/no/such/folder", "x/" * 3000):
            with pytest.raises(MinisaError, match="there is no such file or folder"):
                resolve(missing)
