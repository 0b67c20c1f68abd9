"""Settings: what is shipped loads, what is wrong is answered in one line that names the remedy."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.config import BuildConfig, PretrainConfig, Section
from mim_scale.config_file import check_config, config_values, digest_config, dump_config, load_config
from mim_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    root: type[Section] = BuildConfig if path.name == "build.yaml" else PretrainConfig
    config = load_config(root, path)
    assert check_config(root, yaml.safe_load(dump_config(config)), "again") == config
    assert digest_config(check_config(root, config_values(config), "again")) == digest_config(config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", "unknown key train.stpes; did you mean train.steps?"),
        ("plan.levels.0.cels=3", "unknown key plan.levels.0.cels; did you mean plan.levels.0.cells?"),
        ("train.steps=abc", "train.steps is 'abc'"),
        ("train.steps=1.5", "train.steps is 1.5"),
        ("train.steps=true", "train.steps is True"),
        ("plan.levels.0.hidden_ratio=0.01", "hides 0 of 8 cells"),
        ("plan.levels.1.views=5", "levels[1].views is 5, but levels[0] hides only 4 of its 8 cells"),
        ("plan.levels.0.views=2", "levels[0].views is 2"),
        ("plan.view=50", "view [50, 50, 50] is not a multiple of token [8, 8, 8]"),
        ("plan.token=4", "plan.token [4, 4, 4] does not fit model: this hybrid makes tokens of"),
        ("train.micro_batch=4", "batch 2 is not a multiple of micro_batch 4"),
        ("model.blocks=[1]", "blocks has 1 numbers"),
        ("model.heads=5", "widths[-1] 96 is not a multiple of its heads 5"),
        ("method.level_weights=[1]", "method.level_weights has 1 numbers"),
        ("data.window_hu=[1, 0]", "window_hu [1.0, 0.0] is empty"),
        ("data.window_hu=[.nan, 0]", "window_hu.0 is nan"),
        ("optimizer.learning_rate=.inf", "learning_rate is inf"),
        ("optimizer.learning_rate=1e30", "learning_rate is 1e+30"),
        ("optimizer.betas=[2, 3]", "optimizer.betas.0 is 2"),
        ("method.level_weights=[-1, 1, 1]", "method.level_weights.0 is -1"),
        ("plan.levels.².views=2", "² is no index of a list of 3"),
        ("optimizer.warmup_steps=100000", "lower it"),
        ("seed=-1", "seed is -1"),
        ("train=3", "train is 3"),
        ("train.steps", "write it as key=value"),
        (
            "plan.foreground={box_share: 0.5, tries: 8, hidden_share: 0.55}",
            "foreground.hidden_share is 0.55, but levels[1].hidden_ratio goes up to 0.6, and a view without air",
        ),
        ("plan.foreground={box_share: 0.5, tries: 8, hidden_share: 1}", "plan.foreground.hidden_share is 1"),
        ("plan.foreground={box_share: 1.5, tries: 8, hidden_share: 0.9}", "plan.foreground.box_share is 1.5"),
        ("plan.foreground={box_share: 0.5, tries: 65, hidden_share: 0.9}", "plan.foreground.tries is 65"),
        ("plan.foreground={tries: 8, hidden_share: 0.9}", "plan.foreground.box_share is missing; it changes results"),
        ("plan.levels.7.views=2", "7 is no index of a list of 3"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, DEMO, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not readable as YAML"),
        ("- 1", "expected `key: value` lines"),
        ("", "expected `key: value` lines"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("seed: 1", "method is missing; it changes results, so it has no default"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(PretrainConfig, tmp_path / "nothing.yaml")


@given(st.floats(min_value=1e-8, max_value=1e8))
def test_numbers_mean_numbers_in_every_notation(value: float) -> None:
    config = load_config(PretrainConfig, DEMO, [f"optimizer.weight_decay={value!r}"])
    assert config.optimizer.weight_decay == value


def test_a_changed_result_changes_the_digest() -> None:
    one, other = load_config(PretrainConfig, DEMO), load_config(PretrainConfig, DEMO, ["seed=12345"])
    assert digest_config(one) != digest_config(other)
