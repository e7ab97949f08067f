"""The examples with frameworks: their readers, their table, and a small run of each (of the whole command by `make test-all`)."""

from __future__ import annotations

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from framework_runs import Run, show

ROOT = Path(__file__).resolve().parents[2]
LINES = "1\t2.5\tA splash even greater than the first.\n2\t-0.6\tToo tepid.\nno columns\n3\t1.0\tA good place to start.\n"

pytestmark = pytest.mark.integrations


def archive(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_sentences_are_read_from_a_file_and_from_a_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from finetune_text import SNIPPETS, sentences

    want = [("A splash even greater than the first.", 1), ("Too tepid.", 0), ("A good place to start.", 1)]
    (tmp_path / "plain.txt").write_text(LINES)
    inner = archive(f"hutto_ICWSM_2014/{SNIPPETS}", LINES.encode())
    (tmp_path / "package.tar.gz").write_bytes(archive("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    assert sentences(tmp_path / "plain.txt") == sentences(tmp_path / "package.tar.gz") == want
    (tmp_path / "other.txt").write_text("nothing")
    (tmp_path / "other.tar.gz").write_bytes(archive("other.txt", b""))
    with pytest.raises(ValueError, match="with tabs between them, are expected"):
        sentences(tmp_path / "other.txt")
    with pytest.raises(ValueError, match="the archive has no movieReviewSnippets"):
        sentences(tmp_path / "other.tar.gz")


def test_the_table_and_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [Run("exact", 0, 0.5, [9.0, 1.0, 1.0, 1.0], 1.0, 0.0), Run("approx", 0, 0.75, [20.0, 0.5, 0.5, 0.5], 0.25, 0.5)]
    show("a title", runs, tmp_path / "rows.jsonl")
    text = capsys.readouterr().out
    assert "a title" in text and "50.00" in text and "75.00" in text and "25 %" in text
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["backend"], r["seconds"], r["seconds_compiled"]) for r in rows] == [("exact", 12.0, 4.0), ("approx", 21.5, 2.0)]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "command",
    [["lightning_images.py", "--width", "64", "--epochs", "1"], ["finetune_lora.py", "--width", "32", "--layers", "1", "--epochs", "1", "--limit", "200"]],
)
def test_an_example_runs(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning" if "lightning" in command[0] else "peft")
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / command[0]), run_name="__main__")
    assert not end.value.code
    assert [json.loads(line)["backend"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["exact", "approx"]
