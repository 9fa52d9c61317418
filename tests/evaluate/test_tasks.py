"""Local multiple-choice tasks, by themselves; tests/evaluate/test_harness.py holds them against lm-eval's."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from questions import QUESTIONS, write_lines
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bitfold.assets import DEMO_MODEL
from bitfold.errors import DataError
from bitfold.evaluate import evaluate_tasks
from bitfold.evaluate.choices import read_questions
from bitfold.evaluate.likelihood import Continuation, encode_pair, log_likelihoods
from bitfold.evaluate.scores import mean_figure
from bitfold.runtime.load import load, load_tokenizer

VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def model():
    return load(DEMO_MODEL, device="cpu")


def tiny(positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


# --- likelihoods ---


def test_likelihoods_equal_an_independent_reference(model):
    """One row at a time, all logits, in float64, whatever the batch."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 1), (5, 3), (3, 5), (9, 2), (5, 3), (1, 7)]
    pairs = [
        Continuation(
            *(tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in both)
        )
        for both in lengths
    ]
    pairs += [
        Continuation(pairs[0].context, (token,)) for token in (7, 8, 9)
    ]  # they share an input
    plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float64)
    expected = []
    for pair in pairs:
        with torch.no_grad():
            logits = plain(torch.tensor([pair.context + pair.tokens])).logits[0].log_softmax(-1)
        first = len(pair.context) - 1
        expected.append(sum(float(logits[first + i, t]) for i, t in enumerate(pair.tokens)))
    for batch in (None, 1, 2):
        steps: list[tuple[int, int]] = []
        found = log_likelihoods(
            model, pairs, 512, batch=batch, progress=lambda *step, to=steps: to.append(step)
        )
        assert found == pytest.approx(expected, abs=1e-4)
        assert steps[-1] == (len(pairs), len(pairs))
    assert len(steps) < len(pairs)


def test_a_context_that_is_too_long_loses_its_left_end():
    model = tiny(positions=16)
    context = tuple(range(100, 140))
    after = (5, 6, 7)
    long = log_likelihoods(model, [Continuation(context, after)], 16)
    short = log_likelihoods(model, [Continuation(context[-14:], after)], 16)
    other = log_likelihoods(model, [Continuation(context[-13:], after)], 16)
    assert long == short
    assert long != other


def test_a_pair_is_cut_as_lm_eval_cuts_it(tokenizer):
    pair = encode_pair(tokenizer, "The answer is ", " yes")
    whole = tokenizer("The answer is  yes")["input_ids"]
    assert list(pair.context + pair.tokens) == whole
    assert list(pair.context) == tokenizer("The answer is")["input_ids"]
    # A text that begins with the special token gets no other one.
    begun = encode_pair(tokenizer, "<|endoftext|>The", " end")
    assert begun.context.count(tokenizer.bos_token_id) == 1


# --- scores ---


def test_a_model_that_finds_one_token_likely_answers_with_it(tokenizer, tmp_path):
    """Logits that do not depend on the context: the answers are known beforehand."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (yes,) = tokenizer(" yes")["input_ids"][:1]
    bias = torch.zeros(VOCAB)
    bias[yes] = 5
    model.lm_head.bias = torch.nn.Parameter(bias)
    lines = [
        {"question": "Is it so?", "choices": [" no".strip(), "yes"], "answer": 1},
        {"question": "And this?", "choices": ["yes", "not at all"], "answer": "B"},
        {"question": "And that?", "choices": ["yes", "no"], "answer": "yes"},
    ]
    path = write_lines(tmp_path / "known.jsonl", lines)
    task = evaluate_tasks(model, path, tokenizer=tokenizer).tasks["known"]
    assert task.score.answers == (1, 0, 0)
    content = task.to_json()
    assert content["acc"] == pytest.approx(2 / 3)
    assert content["acc_se"] == pytest.approx(math.sqrt(2 / 9 / 2))
    assert content["questions"] == 3
    assert "recovery" not in content


def test_a_long_choice_is_not_punished_for_its_length(tokenizer, tmp_path):
    """Every token is as likely as any other: the fewest tokens win, or the most characters, or bytes, a token."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    choices = ["x", "q z x", "… …"]
    tokens = [len(encode_pair(tokenizer, "Q", f" {choice}").tokens) for choice in choices]

    def best(lengths: list[int]) -> int:
        return min(range(3), key=lambda i: tokens[i] / lengths[i])

    expected = {
        "acc": best([1, 1, 1]),
        "acc_norm": best([len(c) for c in choices]),
        "acc_bytes": best([len(c.encode()) for c in choices]),
    }
    for right in range(3):
        lines = [{"question": "Q", "choices": choices, "answer": right}]
        score = (
            evaluate_tasks(model, write_lines(tmp_path / "u.jsonl", lines), tokenizer=tokenizer)
            .tasks["u"]
            .score
        )
        assert {name: f.value for name, f in score.figures.items()} == {
            name: float(pick == right) for name, pick in expected.items()
        }
    assert len(set(expected.values())) == 3
    assert score.figures["acc"].error is None  # of one question


def test_against_itself_everything_is_kept(model, tokenizer, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    steps: list[tuple[int, int, str]] = []
    found = evaluate_tasks(
        model, [path], tokenizer=tokenizer, against=model, progress=lambda *step: steps.append(step)
    )
    content = found.to_json()["q"]
    assert content["same_answers"] == 1
    assert set(content["recovery"].values()) == {1.0}
    assert content["original"]["acc"] == content["acc"]
    assert {what for _, _, what in steps} == {"q", "the original, q"}
    assert found.notes == ()


def test_another_model_keeps_what_its_accuracy_says(tokenizer, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    both = evaluate_tasks(DEMO_MODEL, path, against=tiny(512), device="cpu", tokenizer=tokenizer)
    (task,) = both.tasks.values()
    alone = evaluate_tasks(tiny(512), path, tokenizer=tokenizer).tasks["q"]
    assert task.original == alone.score
    acc, other = task.score.figures["acc"].value, alone.score.figures["acc"].value
    assert task.recovery["acc"] == acc / other
    same = [a == b for a, b in zip(task.score.answers, alone.score.answers, strict=True)]
    assert task.same_answers == sum(same) / len(same) < 1


def test_limit_takes_the_first_questions(model, tokenizer, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    first = write_lines(tmp_path / "first.jsonl", QUESTIONS[:5])
    limited = evaluate_tasks(model, path, tokenizer=tokenizer, limit=5).tasks["q"]
    assert limited == evaluate_tasks(model, first, tokenizer=tokenizer).tasks["first"]
    assert limited.score.questions == 5


def test_cut_questions_are_said(tokenizer, tmp_path):
    lines = [{"question": "word " * 50, "choices": ["yes", "no"], "answer": 0}, QUESTIONS[0]]
    path = write_lines(tmp_path / "long.jsonl", lines)
    found = evaluate_tasks(tiny(positions=40), path, tokenizer=tokenizer)
    assert found.to_json()["long"]["cut"] == 2
    (note,) = found.notes
    assert note.startswith("long: 2 inputs were longer than the model takes")


def test_a_broken_model_has_no_accuracy(tokenizer, tmp_path):
    model = tiny(512)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    path = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    found = evaluate_tasks(model, path, tokenizer=tokenizer, against=tiny(512)).to_json()["q"]
    assert found["acc"] is found["recovery"]["acc"] is found["same_answers"] is None
    assert found["nonfinite_questions"] == len(QUESTIONS)
    json.dumps(found, allow_nan=False)


def test_standard_error_of_the_mean():
    values = [1.0, 1.0, 0.0, 1.0, 0.0]
    figure = mean_figure(values)
    assert figure.value == 0.6
    assert figure.error == pytest.approx(torch.tensor(values).std().item() / math.sqrt(5))


# --- files ---


def test_answers_in_three_ways(tmp_path):
    choices = ["red", "B", "blue"]
    answers: list[Any] = [2, "C", "blue", "B", "red", 0]
    lines = [{"question": "Q", "choices": choices, "answer": answer} for answer in answers]
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert [question.answer for question in read_questions(path)] == [2, 2, 2, 1, 0, 0]


GOOD = {"question": "Q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 2}, "the answer 2 is none of the 2 choices"),
        ({"answer": -1}, "the answer -1 is none of the 2 choices"),
        ({"answer": "C"}, "the answer 'C' is none of the 2 choices"),
        ({"answer": "c"}, "the answer 'c' is none"),
        ({"answer": True}, "the answer True is none"),
        ({"answer": 1.0}, "the answer 1.0 is none"),
        ({"answer": None}, "the answer None is none"),
        ({"choices": ["B", "A"], "answer": "A"}, "a letter and the text of another choice"),
        ({"choices": ["a", " "]}, "choice 1 must be a text that is not empty"),
        ({"choices": ["a", 3]}, "choice 1 must be a text"),
        ({"choices": ["a"]}, "at least two"),
        ({"choices": "ab"}, "must be a list"),
        ({"question": " \n"}, "'question' must be a text that is not empty"),
        ({"question": 3}, "'question' must be a text"),
        ({"choices": ["a", "\ud800"]}, "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], words: str):
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, GOOD | change])
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert words in str(caught.value)


def test_lines_that_are_no_questions(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "Q", "choices": ["a", "b"]}\n')
    with pytest.raises(DataError, match="line 1 lacks one of question, choices, answer"):
        read_questions(path)
    path.write_text(f"{json.dumps(GOOD)}\n\n{{")
    with pytest.raises(DataError, match="line 3 is broken JSON"):
        read_questions(path)


def test_what_cannot_be_asked(model, tokenizer, tmp_path):
    path = write_lines(tmp_path / "q.jsonl", [GOOD])

    def fails(words: str, tasks: Any, **options: Any) -> None:
        with pytest.raises(DataError, match=words):
            evaluate_tasks(options.pop("model", model), tasks, tokenizer=tokenizer, **options)

    fails("There is no file", tmp_path / "absent.jsonl")
    fails("There is no task", [])
    fails("Two tasks are named 'q'", [path, tmp_path / "other" / "q.jsonl"])
    fails("questions must be at least 1", path, limit=0)
    fails("rows must be at least 1", path, batch=0)
    long = write_lines(tmp_path / "long.jsonl", [GOOD | {"choices": ["a", "word " * 99]}])
    fails("line 1: a choice of .* tokens is beyond the 16", long, model=tiny(positions=16))
    with pytest.raises(DataError, match="pass tokenizer="):
        evaluate_tasks(model, path)
