"""What a setting may be is said once, and the parser, its help and every error message follow it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import medcl
import medcl.config
from medcl import cli
from medcl.config import from_mapping
from medcl.config.kinds import Count, Kind, Positive, Settings, Share, Within, kind_of, kinds_of
from medcl.config.parsing import parse
from medcl.errors import MedclError

COMMANDS = {name: (getattr(medcl.config, config), positional) for name, (_, positional, config, _) in
            cli.COMMANDS.items()}  # fmt: skip
FIELDS = [(name, field.name) for name, (kind, _) in COMMANDS.items() for field in dataclasses.fields(kind)]


@given(st.floats(-3, 3), st.floats(-2, 1), st.floats(1, 2), st.booleans(), st.booleans())
def test_a_range_holds_what_its_words_say(value, low, high, above, below):
    held = (value > low if above else value >= low) and (value < high if below else value <= high)
    assert (value in Within(low, high, above, below)) == held
    assert (value in Within(low)) == (value >= low)
    assert math.inf not in Within(low) and math.nan not in Within(low)


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (Count, [1, 7], [0, -1, 1.0, True, "1", None, math.nan], "a whole number, 1 or more"),
        (Positive, [0.1, 3], [0, -1, math.inf, math.nan, "x", None], "a number, more than 0"),
        (Share, [0, 0.5, 1], [-0.1, 1.1, True], "a number, 0 to 1"),
        (Literal["", "a", "b"], ["", "a"], ["c", None, 1], "a or b"),
        (Literal[3, 2], [2, 3], [3.0, "3", True], "3 or 2"),
        (int | None, [None, 0, -4], [1.5, "x"], "a whole number"),
        (tuple[Positive, Positive, Positive] | None, [None, (1, 2, 3.5), [1, 1, 1]], [(1, 2), (1, 2, 0), 3],
         "three numbers, each more than 0"),
        (list[str], [[], ["a"]], ["a", 3, None], "a list"),
        (dict[str, int], [{}], [[], 3], "`key: value` pairs"),
        (bool, [True, False], [0, "true", None], "true or false"),
    ],
)  # fmt: skip
def test_a_kind_tells_what_fits(hint, good, bad, words):
    kind = kind_of(hint)
    assert kind.describe() == words
    assert all(map(kind.fits, good)) and not any(map(kind.fits, bad))


def test_paths_and_numbers_become_text_where_text_is_wanted():
    config = medcl.FinetuneConfig(Path("scans"), Path("run"), labels=2, precision=32)
    assert (config.source, config.out, config.labels, config.precision) == ("scans", "run", "2", "32")
    read = from_mapping(medcl.FinetuneConfig, yaml.safe_load("{source: a, out: b, precision: 16}"), "x")
    assert read.precision == "16"


def test_python_yaml_and_flags_are_told_the_same():
    with pytest.raises(MedclError) as python:
        medcl.PretrainConfig("a", "b", warmup=1.0)
    with pytest.raises(MedclError) as flags:
        parse("pretrain", ("source",), "PretrainConfig", ["a", "--out", "b", "--warmup", "1"])
    with pytest.raises(MedclError) as nested:
        from_mapping(medcl.PretrainConfig, {"source": "a", "out": "b", "warmup": 1.0}, "arms.voco.pretrain")
    told = "1.0 cannot be used. Give a number, 0 or more, below 1."
    assert str(python.value) == str(flags.value) == f"--warmup: {told}"
    assert str(nested.value) == f"arms.voco.pretrain, warmup: {told}"


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_a_bad_value_in_a_file_is_told_by_field_and_what_it_may_be(command, name, tmp_path, capsys):
    """No bad value comes to be an unexpected error, whatever the field."""
    kind, _ = COMMANDS[command]
    what = kinds_of(kind)[name]
    bad = {int: "three", float: [1], bool: "perhaps", str: {"a": 1}}.get(what.plain, 7)
    values = {field.name: "x" for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING}  # fmt: skip
    values |= {key: ["x"] for key in values if kinds_of(kind)[key].plain == list[str]} | {name: bad}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    given = [] if command == "benchmark" else ["--config"]
    assert cli.main([*command.split(), *given, str(tmp_path / "bad.yaml")]) == 2
    line = capsys.readouterr().err.strip()
    assert re.match(rf"medcl: error: --{name}: .* cannot be used\. Give .*\.$", line) and what.describe() in line


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_shows_groups_choices_ranges_and_defaults(command, capsys):
    kind, _ = COMMANDS[command]
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for name, what in kinds_of(kind).items():
        assert f"--{name} " in flat, name
        choices = [str(choice) for choice in what.choices if choice != ""]
        assert not choices or "{" + ",".join(choices) + "}" in flat
        assert not what.within or what.describe() in flat
    if issubclass(kind, medcl.config.groups.HardwareSettings):
        assert "Steps and optimiser:" in text and "Devices, processes and memory:" in text
    assert "Annotated" not in text and "Literal" not in text and "MISSING" not in text


def test_choices_are_those_of_the_registries():
    from medcl.config.mil import Aggregators, MILFitConfig
    from medcl.evaluation.absence import COUNTS
    from medcl.losses.bags import SCHEDULES
    from medcl.networks.backbone import NORMS
    from medcl.networks.backbones import BACKBONES
    from medcl.pretext.registry import TASKS
    from medcl.runtime.precision import NAMES
    from medcl.segmentation.semi.registry import METHODS
    from medcl.transforms.mixing import MIXES

    def choices(config, name):
        return set(kinds_of(config)[name].choices)

    pretrain, finetune = medcl.PretrainConfig, medcl.FinetuneConfig
    assert choices(pretrain, "backbone") == set(BACKBONES) == choices(finetune, "backbone") - {""}
    assert choices(pretrain, "norm") == set(NORMS) == choices(finetune, "norm") - {""}
    assert choices(pretrain, "precision") == {"auto", *NAMES}
    assert choices(finetune, "semi") == {"none", *METHODS} and choices(finetune, "mix") == set(MIXES)
    assert choices(medcl.EvaluateConfig, "absent") == set(COUNTS)
    assert choices(MILFitConfig, "schedule") == set(SCHEDULES)
    if pytest.importorskip("sklearn", reason="the extra `mil` is not installed"):
        from medcl.mil.aggregators import AGGREGATORS
        from medcl.mil.training import METHODS as BAG_METHODS

        assert set(get_args(Aggregators)) == set(AGGREGATORS)
        assert choices(MILFitConfig, "method") == set(BAG_METHODS)
    (task,) = (line for line in (pretrain.__doc__ or "").split("\n        ") if line.startswith("task:"))
    told = set(re.findall(r"\w+", (pretrain.__doc__ or "").split("pretext task:")[1].split("options:")[0]))
    assert set(TASKS) <= told, task


def test_a_field_of_another_type_is_no_default():
    for kind, _ in COMMANDS.values():
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                assert kinds_of(kind)[field.name].fits(field.default), field.name


def test_settings_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Mine(Settings):
        size: Annotated[int, Within(2, 4)] = 3

    assert kinds_of(Mine)["size"] == Kind(int, within=Within(2, 4))
    with pytest.raises(MedclError, match=r"--size: 5 cannot be used\. Give a whole number, 2 to 4"):
        Mine(5)
