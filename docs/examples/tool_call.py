"""Let a model call a tool, through stock `mlx_lm.server`, as any OpenAI client does.

    mlx_lm.server --model DIR --trust-remote-code --port 8080
    python docs/examples/tool_call.py http://127.0.0.1:8080

It asks through the `openai` package if installed, else through the standard library.
"""

import json
import sys
import urllib.request

PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"name": "create_file", "description": "Create a file.", "parameters": PATH}
ASKED = {
    "model": "default_model",
    "messages": [{"role": "user", "content": "Create a file with path = notes.txt"}],
    "tools": [{"type": "function", "function": TOOL}],
    "temperature": 0,
    "max_tokens": 64,
}


def ask(address: str) -> dict:
    """Return the reply of a server, as JSON values."""
    try:
        from openai import OpenAI
    except ImportError:
        url, head = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(ASKED).encode(), head)
        return json.load(urllib.request.urlopen(request))
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    return client.chat.completions.create(**ASKED).model_dump()


if __name__ == "__main__":
    message = ask(sys.argv[1])["choices"][0]["message"]
    for call in message.get("tool_calls") or []:
        print(call["function"]["name"], json.loads(call["function"]["arguments"]))
