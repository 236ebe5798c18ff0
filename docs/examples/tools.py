"""Functions that `flashmoe-chat --tools docs/examples/tools.py` offers to the model.

Type hints and docstrings tell the model what it may call; you are asked before each call.
"""

from typing import Literal


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict:
    """Get the weather.

    Args:
        city: City
        unit: Unit of measurement
    """
    temperature = {"celsius": 21, "fahrenheit": 70}[unit]
    return {"city": city, "temperature": temperature}


def book_table(name: str, people: int, time: str = "19:00") -> dict:
    """Book a table.

    Args:
        name: Full name of the person
        people: How many people
        time: Time of day, HH:MM
    """
    return {"name": name, "people": people, "time": time}
