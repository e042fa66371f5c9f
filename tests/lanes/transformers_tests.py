"""Run transformers' own tests with a lossless `MixKVQCache` in the place of every `DynamicCache`.

    python tests/lanes/transformers_tests.py CHECKOUT

``CHECKOUT`` is a folder with transformers' ``tests/`` and ``src/`` (``git clone`` of a release's tag). Each test file
runs twice, with the stock cache and with ours; outcomes are compared test by test (docs/transformers-tests.md).

Exit status: 0 if every test that passes with the stock cache passes with ours, but for those listed with a reason in
``expected_differences.toml``; 1 if not, or if nothing was packed; 2 if the tests cannot be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from judgement import Run, as_json, compare, print_rows, print_verdict, read_expected

HERE = Path(__file__).parent
FAMILIES = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "cohere2", "deepseek_v3"),
    *("qwen3_next", "jamba", "falcon_h1", "gpt_neox", "bart", "t5", "whisper", "qwen2_vl"),
    *("gemma3n", "exaone4", "qwen3_5", "bamba", "zamba2", "lfm2", "diffllama", "gpt2", "falcon", "gptj"),
    *("bloom",),
]
DEFAULT_FILES = ["tests/utils/test_cache_utils.py", "tests/generation/test_utils.py", *FAMILIES]
JUDGED = [
    *("generat", "greedy", "beam", "sample", "decoding", "continu", "padding", "mask", "inputs_embeds", "cache"),
    *("crop", "past", "outputs", "batching"),
]
LEFT_OUT = [
    *("flash", "fa2", "fa3", "fa4", "compil", "export", "quant", "fsdp", "test_tp_", "test_ep_", "multi_gpu"),
    *("multi_accelerator", "deepspeed", "pipeline", "sdpa_inference"),
]


def main(argv: list[str] | None = None) -> int:
    """Judge; the exit status."""
    args = parser().parse_args(argv)
    checkout: Path = args.checkout.resolve()
    if not (checkout / "tests").is_dir() or not (args.installed or (checkout / "src/transformers").is_dir()):
        return refuse(f"CHECKOUT is {args.checkout}: must have the folders tests and src/transformers of transformers")
    ours = importlib.util.find_spec("mixkvq")
    if ours is None or ours.origin is None:
        return refuse("mixkvq is not installed")
    files = [name if name.endswith(".py") else f"tests/models/{name}/test_modeling_{name}.py" for name in args.files]
    absent = [name for name in files if not (checkout / name).is_file()]
    if absent and args.files is not DEFAULT_FILES:
        return refuse(f"--files: {', '.join(absent)} not in {args.checkout}")
    files = [name for name in files if name not in absent]
    try:
        expected = read_expected(args.expected)
    except (OSError, ValueError) as error:
        return refuse(f"--expected: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(checkout, Path(ours.origin).parents[1], args, Path(temporary))
        with ThreadPoolExecutor(args.jobs) as pool:
            results = dict(zip(files, print_rows(files, pool.map(runner.both, files)), strict=True))
    differences = compare(results, expected)
    if args.json:
        args.json.write_text(json.dumps(as_json(results, differences), indent=1))
    return 0 if print_verdict(results, differences) else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder with transformers' tests and src")
    command.add_argument(
        "--files",
        nargs="+",
        default=DEFAULT_FILES,
        metavar="FILE",
        help=f"test files below CHECKOUT, or names of families (default: {' '.join(DEFAULT_FILES)})",
    )
    command.add_argument(
        "--select",
        default=f"({' or '.join(JUDGED)}) and not ({' or '.join(LEFT_OUT)})",
        metavar="EXPRESSION",
        help="which tests, as in pytest -k (default: %(default)s)",
    )
    command.add_argument(
        "--installed", action="store_true", help="run CHECKOUT's tests on the installed transformers, not on its src"
    )
    command.add_argument(
        "--overlay",
        type=Path,
        metavar="DIR",
        help="with --installed: folder whose tests/*.py replace CHECKOUT's, such as the unpacked sdist of that release",
    )
    command.add_argument(
        "--stand-ins",
        action="store_true",
        help="random models in the place of the hub's tiny ones (stand_ins.py), where the hub's cache lacks them",
    )
    command.add_argument("--expected", type=Path, default=HERE / "expected_differences.toml", metavar="TOML")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="files at a time (default: 1)")
    command.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for one run of one file")
    command.add_argument("--json", type=Path, metavar="OUT", help="write all outcomes there")
    command.add_argument("--logs", type=Path, metavar="DIR", help="keep pytest's output there")
    return command


def refuse(message: str) -> int:
    """Say why nothing can be run."""
    print(message, file=sys.stderr)
    return 2


def laid_over(checkout: Path, overlay: Path, work: Path) -> Path:
    """A copy of the checkout's tests with some files of another release."""
    root = work / "checkout"
    for name in ("tests", "utils"):
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, root / name)
    for name in ("conftest.py", "pyproject.toml"):
        if (checkout / name).is_file():
            shutil.copy(checkout / name, root / name)
    for file in sorted((overlay / "tests").glob("*.py")):
        shutil.copy(file, root / "tests" / file.name)
    return root


def complaint(output: str) -> str:
    """Why pytest could not run a file."""
    absent = sorted(set(re.findall(r"No module named '([^']+)'", output)))
    if absent:
        return f"the tests need {', '.join(absent)}, which is not installed"
    lines = [line for line in output.splitlines() if line.startswith("E  ")] or output.splitlines()
    return " / ".join(line.strip() for line in lines[-3:])


class Runner:
    """Runs test files in processes of their own."""

    def __init__(self, checkout: Path, ours: Path, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.root = laid_over(checkout, args.overlay, work) if args.overlay else checkout
        source = [] if args.installed else [str(checkout / "src")]
        given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        path = [*source, *given, str(ours), str(HERE)]
        self.environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path)}
        self.environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        helpers = checkout / "src/transformers/testing_utils.py"
        self.helpers = [f"--testing-utils={helpers}"] if args.installed and helpers.is_file() else []
        if args.stand_ins:
            hub = str(work / "hub")
            subprocess.run([sys.executable, HERE / "stand_ins.py", hub], env=self.environment, check=True)
            self.environment["HF_HUB_CACHE"] = hub

    def both(self, file: str) -> tuple[Run, Run]:
        """Run a file with the stock cache and with ours."""
        return self.run(file, swapped=False), self.run(file, swapped=True)

    def run(self, file: str, *, swapped: bool) -> Run:
        """Run a file once."""
        name = f"{file.replace('/', '.').removesuffix('.py')}.{'swapped' if swapped else 'stock'}"
        outcomes, report = self.work / f"{name}.outcomes.json", self.work / f"{name}.json"
        swap = ["-p", "swapped_cache", f"--swap-report={report}"] if swapped else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "same_conditions",
            f"--outcomes={outcomes}",
            *self.helpers,
            *swap,
        ]
        command += [file, "-q", "-k", self.args.select, "-o", "log_cli=0", "-p", "no:cacheprovider"]
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.args.timeout,
            )
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            status = -1
        run = Run(seconds=time.monotonic() - begin)
        if self.args.logs:
            self.args.logs.mkdir(parents=True, exist_ok=True)
            (self.args.logs / f"{name}.log").write_text(output)
        if status == -1:
            run.trouble = f"not done after {self.args.timeout} s"
        elif outcomes.is_file() and status in (0, 1, 5):
            run.outcomes = {test: tuple(found) for test, found in json.loads(outcomes.read_text()).items()}
        else:
            run.trouble = f"pytest ended with {status}: {complaint(output)}"
        if report.is_file():
            run.swapped = json.loads(report.read_text())
        return run


if __name__ == "__main__":
    sys.exit(main())
