"""Settings: wrong ones are told in a line that names them."""

import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from p2pz.presets import PRESETS, Settings, settings_for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "5"}, "steps must be a whole number from 1 to 999, not '5'"),
        ({"steps": True}, "steps must be a whole number from 1 to 999, not True"),
        ({"strength": "1"}, "strength must be a number, not '1'"),
        ({"guidance": [2]}, "guidance must be a number, not [2]"),
        ({"guidance": True}, "guidance must be a number, not True"),
        ({"guidance": float("inf")}, "guidance must be zero or more, not inf"),
        ({"xa_guidance": 1j}, "xa_guidance must be a number, not 1j"),
        ({"blend": "0.1"}, "blend must be a number, not '0.1'"),
        ({"blend": -0.1}, "blend must be zero or more, not -0.1"),
        ({"blend": float("nan")}, "blend must be zero or more, not nan"),
        ({"autocorrelation_strength": "x"}, "autocorrelation_strength must be a number, not 'x'"),
        ({"kl_strength": ()}, "kl_strength must be a number, not ()"),
        ({"rounds": -1}, "rounds must be zero or more, not -1"),
        ({"rounds": 2.0}, "rounds must be a whole number, not 2.0"),
        ({"rolls": "5"}, "rolls must be a whole number, not '5'"),
        ({"lowest_offset": -1}, "lowest_offset must be zero or more, not -1"),
        ({"lowest_offset": 4}, "lowest_offset must be from 0 to 3, not 4"),
        ({"sample_posterior": "no"}, "sample_posterior must be one of False, True, not 'no'"),
        ({"gradient": []}, "gradient must be one of conditional, both, halves, not []"),
        ({"guided_steps": "ab"}, "guided_steps must be a tuple of numbers, not 'ab'"),
        ({"guided_steps": 0.5}, "guided_steps must be a tuple of numbers, not 0.5"),
        ({"guided_steps": (0.5,)}, "guided_steps must be two shares from 0 to 1, the smaller first, not (0.5,)"),
        ({"resolution_weights": 1.0}, "resolution_weights must be a tuple of numbers, not 1.0"),
        ({"resolution_weights": (1.0, None)}, "resolution_weights must be a tuple of numbers, not (1.0, None)"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_or_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        settings_for(SimpleNamespace(is_mini=False), "p2pz", **changes)


def test_numbers_of_numpy_become_pythons():
    given = {"steps": np.int64(5), "guidance": np.float32(2), "rounds": np.int8(3), "blend": 0}
    given |= {"guided_steps": np.array([0, 0.5]), "resolution_weights": [1, np.float16(2)]}
    given |= {"sample_posterior": np.bool_(True), "form": np.str_("every")}
    wanted = {"steps": 5, "guidance": 2.0, "rounds": 3, "blend": 0.0, "sample_posterior": True, "form": "every"}
    wanted |= {"guided_steps": (0.0, 0.5), "resolution_weights": (1.0, 2.0)}
    settings = Settings(**given)
    assert settings == Settings(**wanted)
    read = json.loads(json.dumps(asdict(settings)))
    assert read["guidance"] == 2.0 and read["sample_posterior"] is True and type(settings.form) is str


@pytest.mark.parametrize("preset", ["best", [], None])
def test_unknown_presets(preset):
    with pytest.raises(ValueError, match=f"preset must be one of {', '.join(PRESETS)}, not "):
        settings_for(SimpleNamespace(is_mini=False), preset)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("streng", "did you mean strength"), ("gudance", "did you mean guidance"), ("x", "the settings are")],
)
@pytest.mark.parametrize("value", [1, None])
def test_unknown_settings(name, hint, value):
    with pytest.raises(TypeError, match=f"^there is no argument or setting {name}: {hint}"):
        settings_for(SimpleNamespace(is_mini=False), "p2pz", **{name: value})
