"""lm-eval's tasks through bitfold, and bitfold's own scoring against lm-eval's on the same questions."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from questions import QUESTIONS, write_lines

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import DataError, MissingExtraError
from bitfold.evaluate import evaluate_tasks
from bitfold.evaluate.harness import find_tasks
from bitfold.runtime.load import load, load_tokenizer

METRICS = ("acc", "acc_norm", "acc_bytes")


def have_lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval, the extra 'tasks', is not installed")


def task_file(directory: Path, **changes: Any) -> Path:
    """A task of lm-eval's on a local file of questions."""
    lines = write_lines(directory / "lines.jsonl", QUESTIONS)
    config: dict[str, Any] = {
        "task": "by_lm_eval",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(lines)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in METRICS],
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    return path


def test_own_scores_are_lm_evals_question_by_question(tmp_path):
    have_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = load(DEMO_MODEL, device="cpu"), load_tokenizer(DEMO_MODEL)
    path = task_file(tmp_path)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[str(path)],
        task_manager=TaskManager(include_defaults=False),
    )
    samples = results["samples"]["by_lm_eval"]
    row = results["results"]["by_lm_eval"]

    own = evaluate_tasks(model, tmp_path / "lines.jsonl", tokenizer=tokenizer).tasks["lines"].score

    likeliest = []
    for sample in samples:
        values = [response[0] for response in sample["filtered_resps"]]
        likeliest.append(values.index(max(values)))
    assert list(own.answers) == likeliest
    for name in METRICS:
        assert own.figures[name].value == pytest.approx(row[f"{name},none"], abs=1e-12)
        assert own.figures[name].error == pytest.approx(row[f"{name}_stderr,none"], abs=1e-12)
    assert 0 < own.figures["acc"].value < 1
    # Each question by itself: accuracies could agree by chance.
    for number in range(0, len(QUESTIONS), 5):
        one = write_lines(tmp_path / "one.jsonl", QUESTIONS[number : number + 1])
        alone = evaluate_tasks(model, one, tokenizer=tokenizer).tasks["one"].score
        for name in METRICS:
            assert alone.figures[name].value == samples[number][name]


def test_a_task_of_lm_eval_and_the_same_questions_here(tmp_path):
    have_lm_eval()
    path = task_file(tmp_path)
    steps: list[tuple[int, int, str]] = []
    found = evaluate_tasks(
        DEMO_MODEL,
        [tmp_path / "lines.jsonl", path],
        against=DEMO_MODEL,
        limit=20,
        device="cpu",
        progress=lambda *step: steps.append(step),
    )
    own, theirs = found.tasks["lines"], found.tasks["by_lm_eval"]
    assert theirs.score.questions == own.score.questions == 20
    assert theirs.score.answers == own.score.answers
    assert {n: f.value for n, f in theirs.score.figures.items()} == pytest.approx(
        {n: f.value for n, f in own.score.figures.items()}
    )
    assert theirs.recovery == dict.fromkeys(METRICS, 1.0)
    assert theirs.same_answers == 1
    assert {what for _, _, what in steps} >= {"lm-eval", "the original, lm-eval", "lines"}
    assert all(0 <= done <= total for done, total, _ in steps)


def test_a_native_artifact_answers_as_it_does_here(tmp_path):
    have_lm_eval()
    out = tmp_path / "native"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="wnf4a16g64")
    path = task_file(tmp_path)
    found = evaluate_tasks(out, [tmp_path / "lines.jsonl", path], limit=20, device="cpu")
    assert found.tasks["by_lm_eval"].score.answers == found.tasks["lines"].score.answers


def test_tasks_that_lm_eval_does_not_have_or_run(tmp_path):
    have_lm_eval()
    with pytest.raises(DataError, match=r"There is no task file .*absent.yaml"):
        find_tasks([str(tmp_path / "absent.yaml")])
    path = task_file(tmp_path)
    (tmp_path / "lines.jsonl").unlink()
    with pytest.raises(DataError, match=r"The data of the task '.*task.yaml' cannot be fetched"):
        find_tasks([str(path)])
    path.write_text("task: x\noutput_type: sing\n")
    with pytest.raises(DataError, match=r"lm-eval cannot load the task '.*task.yaml'"):
        find_tasks([str(path)])


def test_a_misspelt_task_is_answered_with_near_ones():
    have_lm_eval()
    with pytest.raises(DataError, match=r"has no task 'arc_eesy': near it are arc_easy"):
        find_tasks(["arc_eesy"])


def test_without_lm_eval_the_extra_is_named():
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="pip install lm-eval"):
            evaluate_tasks(DEMO_MODEL, "arc_easy")
    else:
        pytest.skip("lm-eval is installed")
