"""Run mlx_lm.server, but refuse requests that end its generation thread or its process.

    python docs/examples/checked_server.py --model DIR --trust-remote-code --port 8080

Such a request gets status 400 and a sentence.
"""

from typing import Any

from mlx_lm import server

validate = server.APIHandler.validate_model_parameters


def checked(handler: Any) -> None:
    """Raise ValueError, to which the server replies with 400, for a request that it cannot take."""
    validate(handler)
    body, model = handler.body, handler.response_generator.model_provider.model
    if model is None:
        raise ValueError("the model is loading; try again")
    tokens = model.args.vocab_size
    prompt, stop = body.get("prompt"), body.get("stop") or ""
    if handler.path == "/v1/completions" and not (isinstance(prompt, str) and prompt):
        raise ValueError("prompt must be one text, and not empty")
    stops = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(part, str) for part in stops):
        raise ValueError("stop must be a text or a list of texts")
    if handler.top_k >= tokens:
        raise ValueError(f"top_k must be below {tokens}")
    if any(not 0 <= token < tokens for token in handler.logit_bias or ()):
        raise ValueError(f"logit_bias must name tokens from 0 to {tokens - 1}")
    if not 0 <= (handler.seed or 0) < 1 << 64:
        raise ValueError("seed must be from 0 to 2^64 - 1")


if __name__ == "__main__":
    server.APIHandler.validate_model_parameters = checked
    server.main()
