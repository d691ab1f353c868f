"""An agent's loop: the model calls a tool, we run it, the model uses the result.

    tritium serve                                   # in another terminal
    python examples/tool_loop.py [BASE_URL]
"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
city = {"type": "string", "description": "Name of the city"}
parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
function = {"name": "get_weather", "description": "Get the weather for a city.", "parameters": parameters}


def get_weather(city: str) -> str:
    return json.dumps({"temperature": 21, "condition": "sunny"})


messages = [{"role": "user", "content": "What is the weather in Paris?"}]
for _ in range(4):
    tools = [{"type": "function", "function": function}]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=tools, temperature=0, max_tokens=400
    ).choices[0]
    if answer.finish_reason != "tool_calls":
        break
    messages.append(answer.message)
    for call in answer.message.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(answer.message.content.strip())
