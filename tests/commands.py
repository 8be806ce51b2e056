"""The blocks and commands of a Markdown text, and whether the programs that commands name understand them.

Each command goes to the parser of its own program: a job's or a script's as it reads a command line, make by a dry run
(and what its recipe starts in turn), `ray`, `pip` and `kubectl` by theirs, `aws` by botocore's model of the service,
`sbatch` by the file that it is given.
Nothing is carried out. What the tests of README.md share; not a test.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from botocore import xform_name
from botocore.session import get_session
from botocore.validate import validate_parameters
from markdown_it import MarkdownIt
from operations import kustomize, one
from pip._internal.commands import create_command
from servers import BIN

from jobs import encode_text, evaluate_vae, finetune_t2v, sample_t2v, train_vae
from pipeline import cli
from pipeline.config import argument_parser, parse_arguments, read_parts

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("aws", "kubectl", "latentmill", "make", "pip", "python", "ray", "sbatch", "torchrun")
_NIGHTLY = ROOT / "infra" / "kubernetes" / "overlays" / "nightly"
# What "..." stands for, where a command is shown without what every command of its program needs.
_ELIDED = {"jobs/encode_laion.py": ("--input", "shards/", "--output", "s3://bucket/latents", "--model", "small")}
_SETTING = re.compile(r"[A-Z_]+=")
# Run by recipes of the Makefile with arguments that are not ours.
_FOREIGN_MODULES = ("pytest", "venv")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code: fenced with a language, or indented and without one.

    Attributes:
        line: its first, counted from 1.
    """

    language: str
    text: str
    line: int

    @property
    def title(self) -> str:
        return self.text.splitlines()[0].strip()

    @property
    def is_shell(self) -> bool:
        return self.language in ("", "bash", "sh", "console") and _program(self.title) in PROGRAMS


@dataclass(frozen=True, slots=True)
class Command:
    """A command line of a block, or one named within a sentence, which may leave out what it is applied to.

    Attributes:
        about: what stands beside it, after two spaces or a `#`.
        line: where its block or paragraph begins, counted from 1.
    """

    text: str
    about: str
    line: int
    is_inline: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def _program(line: str) -> str:
    """The first word after settings of the environment."""
    return next((word for word in line.split() if not _SETTING.match(word)), "")


def blocks_in(text: str) -> list[Block]:
    return [
        Block(language=token.info, text=token.content, line=token.map[0] + 1)
        for token in _tokens(text)
        if token.type in ("fence", "code_block") and token.map is not None
    ]


def spans_in(text: str) -> Iterator[tuple[str, int]]:
    """Code within sentences and tables, and the line where its paragraph begins."""
    for token in _tokens(text):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content, (token.map or [0])[0] + 1


def targets_in(text: str) -> Iterator[str]:
    """Where links and pictures lead."""
    for token in _tokens(text):
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                yield str(child.attrs["href" if child.type == "link_open" else "src"])


@functools.lru_cache(maxsize=4)
def _tokens(text: str) -> tuple[Any, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(text))


def commands_in(text: str) -> list[Command]:
    """In the order of the text; of those named in sentences each wording once."""
    found: list[Command] = []
    for block in blocks_in(text):
        if block.is_shell:
            lines = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
            for line in (line for line in lines if line.strip() and not line.lstrip().startswith("#")):
                command, _, about = re.match(r"(.+?)(\s{2,}|\s#|$)(.*)", line.strip()).groups()  # type: ignore[union-attr]
                found.append(Command(command, about, block.line, is_inline=False))
    named = {}
    for span, line in spans_in(text):
        if len(span.split()) > 1 and _program(span) in PROGRAMS:
            named.setdefault(span, Command(span, "", line, is_inline=True))
    return sorted([*found, *named.values()], key=lambda command: command.line)


def why_refused(command: Command) -> str | None:
    """What the program has against a command; None where it understands it."""
    checks: dict[str, Callable[[Command, list[str]], None]] = {
        "aws": _aws,
        "kubectl": _kubectl,
        "latentmill": _latentmill,
        "make": _make,
        "pip": _pip,
        "python": lambda _, words: understand_python(words[1:]),
        "ray": _ray,
        "sbatch": _sbatch,
    }
    where = os.getcwd()
    os.chdir(ROOT)
    try:
        words = list(dropwhile(_SETTING.match, shlex.split(command.text, comments=True)))
        checks[words[0]](command, words)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(where)
    return None


def _latentmill(command: Command, words: list[str]) -> None:
    is_complete = not command.is_inline or (len(words) > 2 and not words[2].startswith("-"))
    cli._parser().parse_args(words[1:] if is_complete else [words[1], "URI", *words[2:]])
    _refuse_unknown_flags([*words, *flags_in(command.about)], subcommands()[words[1]])


def _refuse_unknown_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    # argparse takes the beginning of a flag for the flag.
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known_flags(parser)
    assert not unknown, f"{parser.prog} has no flag {', '.join(sorted(unknown))}"


def _make(_: Command, words: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "--dry-run", *words[1:]], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        # The words before are settings of the recipe's environment.
        _, is_ours, rest = line.partition(".venv/bin/python ")
        if is_ours:
            understand_python(shlex.split(rest))


def understand_python(words: Sequence[str]) -> None:
    """Raises whatever a program of this repository has against the arguments after `python`."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    if words[0] == "-m":
        name, argv = words[1], list(words[2:])
        if name in _FOREIGN_MODULES:
            return
        script = f"tests/{name.replace('.', '/')}.py"
    else:
        script, argv = words[0], list(words[1:])
    assert (ROOT / script).is_file(), f"{script} is not there"
    if "..." in argv:
        place = argv.index("...")
        argv[place : place + 1] = _ELIDED[script]
    if script in _JOBS:
        _JOBS[script](argv)
    else:
        _parsed_by(script, argv)


_JOBS: dict[str, Callable[[Sequence[str]], object]] = {
    "jobs/encode_laion.py": parse_arguments,
    "jobs/encode_text.py": lambda argv: read_parts(argv, encode_text.PARTS),
    "jobs/evaluate_vae.py": lambda argv: evaluate_vae._parser().parse_args(argv),
    "jobs/finetune_t2v.py": finetune_t2v.read_job,
    "jobs/sample_t2v.py": lambda argv: read_parts(argv, sample_t2v.PARTS),
    "jobs/train_vae.py": train_vae.read_job,
}


class _Understood(BaseException):
    """The command line was read: nothing after it is wanted. Programs that report every Exception let this one pass."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _parsed_by(script: str, argv: Sequence[str]) -> argparse.ArgumentParser:
    """Starts a script up to where it has read its command line; returns its parser."""
    name = script.removesuffix(".py").removeprefix("tests/").replace("/", ".")
    main: Callable[..., object] = importlib.import_module(name).main
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        parse(parser, *given)
        raise _Understood(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script, *argv])
        try:
            main(*[argv] * len(inspect.signature(main).parameters))
        except _Understood as understood:
            _refuse_unknown_flags(argv, understood.parser)
            return understood.parser
    raise AssertionError(f"{script} reads no command line")


def _ray(_: Command, words: list[str]) -> None:
    from ray.scripts.scripts import cli as program

    command: Any = program
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    assert command is not program, f"ray has no command {rest[0]}"
    if not rest:
        # The name of a command, in a sentence.
        return
    given = command.make_context("ray", list(rest)).params
    if "entrypoint" in given:
        started = list(given["entrypoint"])
        assert started[0] == "python", started
        understand_python(started[1:])
    if "cluster_config_file" in given:
        assert yaml.safe_load((ROOT / given["cluster_config_file"]).read_text(encoding="utf-8"))["cluster_name"]


def _sbatch(_: Command, words: list[str]) -> None:
    place = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    said = (ROOT / words[place]).read_text(encoding="utf-8")
    known = set(re.findall(r"^#SBATCH (--[\w-]+)", said, flags=re.MULTILINE))
    # What is changed is something that the file sets.
    assert set(flags_in(" ".join(words[1:place]))) <= known, words[1:place]
    parse_arguments(words[place + 1 :])


def _pip(_: Command, words: list[str]) -> None:
    options, requirements = create_command(words[1]).parse_args(words[2:])
    for path in (*options.requirements, *options.constraints):
        assert (ROOT / path).is_file(), f"{path} is not there"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in requirements:
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", requirement)
        assert extra is None or extra[1] in (None, *project["optional-dependencies"]), f"no extra {requirement}"


def _kubectl(_: Command, words: list[str]) -> None:
    place = next(number for number, word in enumerate(words) if word in ("apply", "job")) + 1
    for flag in (word.partition("=")[0] for word in words[place:] if word.startswith("-")):
        said = "".join(_kubectl_says(*about) for about in ((*words[1:place], "--help"), ("options",)))
        assert re.search(rf"^ +(-\w, )?{flag}[,=]", said, flags=re.MULTILINE), f"kubectl has no flag {flag}"
    folder = next((after for word, after in pairwise(words) if word in ("-k", "-f")), None)
    if folder is not None:
        assert kustomize(ROOT / folder) if "-k" in words else (ROOT / folder).is_file(), f"{folder} is not there"
    for word in words:
        if word.startswith("--from=cronjob/"):
            schedule = one(_nightly(), "CronJob", word.rpartition("/")[2])
            assert schedule["metadata"]["namespace"] == words[words.index("--namespace") + 1]


@functools.cache
def _kubectl_says(*words: str) -> str:
    return subprocess.run([BIN / "kubectl", *words], capture_output=True, text=True, check=True).stdout


@functools.cache
def _nightly() -> list[dict[str, Any]]:
    return kustomize(_NIGHTLY)


def _aws(_: Command, words: list[str]) -> None:
    service = get_session().get_service_model(words[1].removesuffix("api"))
    operations = {xform_name(name, "-"): name for name in service.operation_names}
    shape = service.operation_model(operations[words[2]]).input_shape
    members = {"--" + xform_name(name, "-"): name for name in shape.members}
    given: dict[str, Any] = {}
    for flag, value in zip(words[3::2], words[4::2], strict=True):
        name = members[flag]
        if value.startswith("file://"):
            text = (ROOT / value.removeprefix("file://")).read_text(encoding="utf-8")
            value = json.loads(text) if shape.members[name].type_name == "structure" else json.dumps(json.loads(text))
        given[name] = value
    validate_parameters(given, shape)


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", text)


def known_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Those of the command `latentmill`."""
    (action,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def every_flag() -> set[str]:
    """The flags of all jobs, of `latentmill`, and of the benchmarks."""
    jobs = [argument_parser(job.PARTS) for job in (encode_text, finetune_t2v, sample_t2v, train_vae)]
    scripts = [_parsed_by(f"tests/{name}.py", []) for name in ("benchmarks/bench_codec", "simulation/run", "chaos/run")]
    parsers = [argument_parser(), *jobs, evaluate_vae._parser(), *subcommands().values(), *scripts]
    return set().union(*map(known_flags, parsers))
