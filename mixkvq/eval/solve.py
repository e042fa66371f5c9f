"""Maths problems as a task of lm-evaluation-harness, in memory: what its ``gsm8k`` does with any problems.

Every prompt shows the same worked examples, then the question; an answer ends at an end token or where the model begins
a new question. The final number is looked for behind ``####`` (strict) and as the last number of the text (flexible).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .problems import Problem, made_problems, read_problems
from .scores import quiet_harness

MADE = "made"
STOPS = ("Question:", "<|endoftext|>", "<|im_end|>", "</s>")
"""A new question, and the end tokens of model families: a model may write another one than its configuration says."""


def choose(source: str, count: int, shots: int, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Questions and worked examples, none of them in both.

    Parameters
    ----------
    source : str
        "made", or the path of a JSON-lines file: the questions are its first lines, the examples its last.
    count, shots : int
    seed : int
        Of made problems.

    Raises
    ------
    UserError
        When the file holds too few.
    """
    if source == MADE:
        questions = made_problems(count, seed)
        return questions, [p for p in made_problems(shots + count, seed + 1) if p not in questions][:shots]
    problems = read_problems(Path(source))
    if len(problems) < count + shots:
        raise UserError(
            f"--problems {source} holds {len(problems)}, must hold at least {count + shots}: --count and --shots"
        )
    questions = problems[:count]
    examples = [p for p in problems[count:] if p not in questions]
    if len(examples) < shots:
        raise UserError(f"--problems {source} repeats its questions: too few others for --shots {shots}")
    return questions, examples[len(examples) - shots :]


def task(questions: Sequence[Problem], shots: Sequence[Problem], max_new_tokens: int, name: str = "problems") -> Any:
    """The lm-eval task of these problems."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    quiet_harness()

    def rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
        return [{"question": p.question, "answer": p.answer} for p in problems]

    number = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows(questions))},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "fewshot_config": {"sampler": "first_n", "samples": rows(shots)},
            "num_fewshot": len(shots),
            "metric_list": [{**number, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}],
            "generation_kwargs": {"until": list(STOPS), "do_sample": False, "max_gen_toks": max_new_tokens},
            "filter_list": [
                {"name": "strict", "filter": [_regex(r"#### (\-?[0-9\.\,]+)"), {"function": "take_first"}]},
                {
                    "name": "flexible",
                    "filter": [
                        _regex(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
                        {"function": "take_first"},
                    ],
                },
            ],
            "metadata": {"version": 1.0},
        }
    )


def _regex(pattern: str, **options: Any) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, **options}
