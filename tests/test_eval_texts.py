"""Windows of text: as long as asked, never the same tokens twice, and plain errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from cli_fixtures import save_tiny_model
from transformers import AutoTokenizer

from mixkvq.errors import UserError
from mixkvq.eval.texts import Window, windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def with_bos(tokenizer):
    """The same tokenizer, putting <unk> before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = tokenizer.backend_tokenizer
    changed = type(core).from_str(core.to_str())
    changed.post_processor = TemplateProcessing(single="user $A", special_tokens=[("user", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=changed, bos_token="user", eos_token="<end>", unk_token="<unk>")


@pytest.mark.parametrize("domain", ["prose", "code", "maths"])
def test_length_and_count(domain: str, tokenizer) -> None:
    found = windows(tokenizer, domain, 3, 500)
    assert [(w.domain, w.index, len(w.ids)) for w in found] == [(domain, i, 500) for i in range(3)]
    assert found == windows(tokenizer, domain, 3, 500)


def numbered(path: Path, words: int) -> list[str]:
    """A text in which the tiny tokenizer tells places apart: the binary digits of a count, most significant first."""
    text = [("cat", "dog")[i >> bit & 1] for i in range(-(-words // 12)) for bit in range(11, -1, -1)][:words]
    path.write_text(" ".join(text))
    return text


def test_windows_of_a_file_are_evenly_spread_and_disjoint(tokenizer, tmp_path: Path) -> None:
    text = numbered(tmp_path / "text.txt", 1000)
    ids = tokenizer.convert_tokens_to_ids(text)
    found = windows(tokenizer, str(tmp_path / "text.txt"), 3, 200)
    assert [list(w.ids) for w in found] == [ids[at : at + 200] for at in (0, 333, 666)]
    assert len({w.digest for w in found}) == 3
    exactly = windows(tokenizer, str(tmp_path / "text.txt"), 5, 200)
    assert [i for w in exactly for i in w.ids] == ids


def test_beginning_token_stands_before_every_window_where_the_tokenizer_wants_it(tokenizer, tmp_path: Path) -> None:
    text, path = numbered(tmp_path / "text.txt", 400), str(tmp_path / "text.txt")
    ids = tokenizer.convert_tokens_to_ids(text)
    found = windows(with_bos(tokenizer), path, 2, 101)
    assert [list(w.ids) for w in found] == [[2, *ids[:100]], [2, *ids[200:300]]]
    assert [list(w.ids) for w in windows(tokenizer, path, 2, 101)] == [ids[:101], ids[200:301]]


def test_maths_windows_hold_different_problems(tokenizer) -> None:
    first, second = windows(tokenizer, "maths", 2, 300)
    assert first.ids != second.ids and first.ids[0] == second.ids[0] == 2  # the chat template begins with "user"


def test_jsonl_becomes_conversations(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "the cat", "answer": f"a <<1+1=2>> dog #### {i}"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = windows(tokenizer, str(path), 2, 60)
    words = ["user", "the", "cat", "<end>", "assistant", "a", "dog", "####", "0", "<end>"]
    assert list(first.ids[:10]) == tokenizer.convert_tokens_to_ids(words)
    assert len(first.ids) == len(second.ids) == 60


def test_digest_depends_on_the_tokens_alone() -> None:
    assert Window("prose", 0, (1, 2)).digest == Window("code", 5, (1, 2)).digest != Window("prose", 0, (12,)).digest


def test_errors(tokenizer, tmp_path: Path) -> None:
    numbered(tmp_path / "short.txt", 99)
    with pytest.raises(UserError, match="must be one of prose, code, maths, or the path of a text file"):
        windows(tokenizer, "poems", 1, 10)
    with pytest.raises(UserError, match=r"short.txt has 99 tokens, must have 100 for 2 windows"):
        windows(tokenizer, str(tmp_path / "short.txt"), 2, 50)
    problem = tmp_path / "one.jsonl"
    problem.write_text('{"question": "a", "answer": "b #### 1"}')
    with pytest.raises(UserError, match=r"one.jsonl has \d+ tokens per window for 1 windows, must have 50"):
        windows(tokenizer, str(problem), 1, 50)
    problem.write_text('{"question": "a"}')
    with pytest.raises(UserError, match="line 1 must be an object"):
        windows(tokenizer, str(problem), 1, 50)
    problem.write_text('{"question": "a", "answer": "five"}')
    with pytest.raises(UserError, match="must end in '#### number'"):
        windows(tokenizer, str(problem), 1, 50)
    with pytest.raises(UserError, match="cannot be read"):
        windows(tokenizer, str(tmp_path / "missing.jsonl"), 1, 50)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfd" * 50)
    with pytest.raises(UserError, match=r"binary.txt is no text file \(UTF-8\)"):
        windows(tokenizer, str(binary), 1, 10)
