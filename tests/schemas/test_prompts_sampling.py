"""Which sampling parameters a version may set."""

import json

import pytest

from schemas import prompts
from schemas.prompts import PromptError, PromptVersion, sampling


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0.05, "seed": 2**32 - 1, "max_tokens": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "stop": "\n\n"},
        {"stop": ["a", "b", "c", "d"], "cache_prompt": False, "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_what_servers_take_is_taken(parameters):
    assert sampling.problem(parameters) is None


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temprature": 1}, "temprature is not known; did you mean temperature"),
        ({"n": 2}, "n is not known; there are temperature"),
        ({"messages": []}, "messages is not known"),
        ({"temperature": 2.1}, "temperature must be a number from 0 to 2, not 2.1"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"presence_penalty": 3}, "presence_penalty must be"),
        ({"stop": ["a"] * 5}, "stop must be a text, or a list of up to 4"),
        ({"stop": [""]}, "stop must be"),
        ({"cache_prompt": 1}, "cache_prompt must be true or false"),
    ],
)
def test_what_they_do_not_is_refused_when_the_version_is_loaded(parameters, words):
    default = prompts.default()
    with pytest.raises(PromptError, match=words):
        PromptVersion(
            template=default.template, output_schema=default.output_schema, parameters=json.dumps(parameters), name="p"
        )
