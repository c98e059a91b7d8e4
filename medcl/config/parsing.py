"""Command-line flags and YAML to a config dataclass, by jsonargparse."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any, Union

import medcl.config
from medcl.config import from_mapping, nearest
from medcl.config.benchmark import recipes_near
from medcl.config.kinds import kinds_of, remedy
from medcl.errors import MedclError


def parse(command: str, positional: Sequence[str], config_name: str, args: list[str]) -> Any:
    """The config of a command, or None where only help was asked for.

    Precedence: the dataclass's defaults, then `--config FILE.yaml`, then flags.

    Raises:
        MedclError: an unknown option or key (the nearest known one is named), or a value that cannot be used.
    """
    from jsonargparse import Namespace

    kind = getattr(medcl.config, config_name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    parser = _parser(command, kind)
    if any(arg in ("-h", "--help") for arg in args):
        print(_help(parser.format_help(), command, positional, fields))
        return None
    flags = _named(args, positional, fields)
    for flag in flags:
        key = flag[2:].split("=")[0].split(".")[0]
        if flag.startswith("--") and key not in fields and key != "config":
            raise MedclError(f"unknown option --{key}", f"medcl {command}", nearest(key, fields))
    _check_files(flags, fields, command)
    try:
        parsed: Namespace = parser.parse_args(flags)
    except Exception as error:  # jsonargparse and argparse raise several kinds
        raise _refused(str(error), command, kind) from None
    values = {k: _nested(v) if k == "options" else v for k, v in parsed.as_dict().items() if k in fields}
    for flag in flags:
        if flag.startswith("--config=") and "arms" in values:
            values["arms"] = recipes_near(values["arms"], flag.split("=", 1)[1])
    return from_mapping(kind, values, f"medcl {command}")


def _parser(command: str, kind: Any) -> Any:
    """jsonargparse's parser of a dataclass: its own fields first, then those that it shares with other stages."""
    from argparse import SUPPRESS, RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=f"medcl {command}", description=(kind.__doc__ or "").split("\n")[0], exit_on_error=False,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_argument("--stage", help=SUPPRESS)  # in the config.yaml of a run
    kinds, texts, owners = kinds_of(kind), _documented(kind), _owners(kind)
    groups: dict[Any, Any] = {kind: parser}
    fields = sorted(dataclasses.fields(kind), key=lambda f: (kind.__mro__.index(owners[f.name]), not _required(f)))
    for field in fields:
        name, owner, what = field.name, owners[field.name], kinds[field.name]
        if owner not in groups:
            groups[owner] = parser.add_argument_group((owner.__doc__ or "").split("\n")[0].rstrip("."))
        default = _default(field)
        notes = [] if what.choices or what.plain in (bool, str) else [what.describe()]
        if _required(field):
            notes.append("required")
        elif default not in ("", None, {}, []):
            notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
        choices = ("true", "false") if what.plain is bool else tuple(c for c in what.choices if c != "")
        groups[owner].add_argument(
            f"--{name}", type=Union[what.plain, None] if what.optional else what.plain, default=default,
            required=_required(field), metavar="{" + ",".join(map(str, choices)) + "}" if choices else name.upper(),
            help=f"{texts[name]} ({', '.join(notes)})" if notes else texts[name],
        )  # fmt: skip
    return parser


def _owners(kind: Any) -> dict[str, type]:
    """For every field the settings that it belongs to: the stage's own, or those that it shares with other stages."""
    owners: dict[str, type] = {}
    for cls in reversed(kind.__mro__):
        for name in vars(cls).get("__annotations__", {}):
            owners.setdefault(name, cls)
    return owners


def _documented(kind: Any) -> dict[str, str]:
    """What the docstrings say of every field, as one line."""
    import docstring_parser

    texts: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        for entry in docstring_parser.parse(cls.__doc__ or "").params if dataclasses.is_dataclass(cls) else ():
            for name in entry.arg_name.split(", "):
                texts[name] = " ".join((entry.description or "").split()).replace("%", "%%")
    return texts


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _refused(message: str, command: str, kind: Any) -> MedclError:
    """What a parser refuses, in terms of the field where it names one."""
    text = _tidy(message)
    named = re.match(r'"?([a-z_0-9]+)"?(?=[\s:."])', text)
    value = re.search(r".*(?:Got|Given) value: (.*)$", text)
    if named and named.group(1) in kinds_of(kind) and value:
        return MedclError(f"{value.group(1)} cannot be used", f"--{named.group(1)}",
                          remedy(kinds_of(kind)[named.group(1)], value.group(1)))  # fmt: skip
    return MedclError(text, f"medcl {command}", f"See medcl {command} --help.")


def _named(args: list[str], positional: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Turns leading and loose positional arguments into flags, and bare boolean flags into `--flag true`."""
    boolean = {name for name, field in fields.items() if field.type in (bool, "bool")}
    lists = {name for name, field in fields.items() if str(field.type).startswith(("list", "tuple"))}
    loose: list[str] = []
    out: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            loose.append(arg)
            continue
        head, *value = arg.split("=", 1)
        head = head.replace("-", "_").replace("__", "--", 1)  # --batch-size is --batch_size
        arg, name = "=".join([head, *value]), head[2:]
        if value:
            out.append(arg)
        elif name in boolean:
            said = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
            out.append(f"{arg}={said.lower()}")
        elif name in lists and name not in positional:
            taken = _take_values(rest)
            out.append(f"{arg}={taken[0] if len(taken) == 1 and taken[0].startswith('[') else _as_list(taken)}")
        elif rest:
            out.append(f"{arg}={rest.pop(0)}")
        else:
            raise MedclError(f"{arg} needs a value", "command line", "Give one behind it.")
    many = [name for name in positional if name in lists]
    if many:
        return [*([f"--{many[0]}={_as_list(loose)}"] if loose else []), *out]
    if len(loose) > len(positional):
        extra = " ".join(loose[len(positional) :])
        raise MedclError(
            f"too many arguments: {extra}", "command line", f"Wanted: {' '.join(p.upper() for p in positional)}."
        )
    return [f"--{name}={value}" for name, value in zip(positional[: len(loose)], loose, strict=True)] + out


def _take_values(rest: list[str]) -> list[str]:
    taken = []
    while rest and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    return taken


def _as_list(values: list[str]) -> str:
    numbers = all(re.fullmatch(r"[-+.\deE]+", value) for value in values)
    return "[" + ", ".join(value if numbers else repr(value) for value in values) + "]"


def _nested(options: Any) -> Any:
    """Options of a task's parts, `--options.global_contrast.temperature 0.2`, which jsonargparse leaves as text."""
    import yaml

    def typed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: typed(inner) for name, inner in value.items()}
        return yaml.safe_load(value) if isinstance(value, str) else value

    if not isinstance(options, dict):
        return options
    return {name: typed(value) if isinstance(value, dict) else value for name, value in options.items()}


def _check_files(flags: list[str], fields: dict[str, Any], command: str) -> None:
    """Refuses unknown keys of a config file, by file and key, before jsonargparse sees it."""
    import yaml

    for flag in flags:
        if not flag.startswith("--config="):
            continue
        path = flag.split("=", 1)[1]
        try:
            with open(path, encoding="utf-8") as stream:
                data = yaml.safe_load(stream) or {}
        except OSError as error:
            raise MedclError(f"cannot be read ({error.strerror})", path, "Check the path.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise MedclError(f"is not YAML ({' '.join(str(error).split())[:120]})", path, "Mend it.") from None
        if not isinstance(data, dict):
            raise MedclError("is not a list of `key: value` lines", path, "See configs/ for examples.")
        # a run's own config.yaml says which command it was
        if data.get("stage", command) != command:
            raise MedclError(f"is the config of `medcl {data['stage']}`", path, f"It is no config of {command}.")
        for key in data:
            if key not in fields and key != "stage":
                raise MedclError(f"unknown key {key!r}", path, nearest(str(key), fields))


def _tidy(text: str) -> str:
    """The informative part of a parser's message."""
    text = " ".join(text.split())
    text = re.sub(r"^(error: )?Parser key ", "", text)
    return text[:300].rstrip(".")


def _help(text: str, command: str, positional: Sequence[str], fields: dict[str, Any]) -> str:
    """The parser's help without the option that jsonargparse adds to every `--config`."""
    needed = {name for name, field in fields.items() if _required(field)} | {"config"}
    shown = [name.upper() if name in needed else f"[{name.upper()}]" for name in positional]
    body = re.sub(r"\n  --print_config.*(\n {8}.*)*", "", text.split("\n\n", 1)[-1])
    return " ".join(["usage: medcl", command, *shown, "[--option VALUE ...]"]) + f"\n\n{body}"


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


if __name__ == "__main__":
    sys.exit("Run `medcl`.")
