"""The interface is pinned: a change to it is seen, and meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

PINNED = Path(__file__).with_name("openapi.json")


def test_the_openapi_document_is_the_pinned_one(client):
    served = client.get("/openapi.json").json()
    if os.environ.get("RENEW_OPENAPI"):
        PINNED.write_text(json.dumps(served, indent=1) + "\n")
    assert served == json.loads(PINNED.read_text()), (
        "the API is not the one in tests/serving/openapi.json: if that is meant, run "
        "`RENEW_OPENAPI=1 pytest tests/serving/test_openapi.py` and look at the diff"
    )


def test_every_error_in_the_document_is_the_envelope(client):
    document = client.get("/openapi.json").json()
    answers = [
        (path, status, answer["content"]["application/json"]["schema"])
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for status, answer in operation["responses"].items()
        if status != "200"
    ]
    assert len(answers) > 60
    for path, _, schema in answers:
        name = "Refusal" if path.startswith("/v2") else "ErrorEnvelope"  # what each protocol's clients read
        assert schema["$ref"] == f"#/components/schemas/{name}"


def test_every_example_in_the_document_runs(client):
    """Each body with each example of an option, and with all of them together."""
    num_examples = 0
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" not in body:
            continue
        options = {
            parameter["name"]: schema["examples"][0]
            for parameter in methods["post"].get("parameters", [])
            for schema in [parameter["schema"]]
            if "examples" in schema
        }
        for chosen in ({}, *({name: value} for name, value in options.items()), options):
            answer = client.post(path.format(model="tiny"), params=chosen, json=body["example"])
            assert answer.status_code == 200, (path, chosen, answer.text)
            num_examples += 1
    assert num_examples > 10
