"""Functions that `flashmoe-chat --tools docs/examples/tools.py` offers to the model.

Type hints and docstrings tell the model what it may call; you are asked before each call.
"""

from typing import Literal


def book_hotel(city: str, date: str) -> dict:
    """Book a hotel.

    Args:
        city: City
        date: Date, YYYY-MM-DD
    """
    return {"city": city, "price": 90}


def get_weather(city: str) -> str:
    """Get the current weather in a city.

    Args:
        city: The name of the city
    """
    return f"{len(city) + 11} degrees, sunny"


def set_alarm(time: str, color: Literal["red", "green", "blue"] = "red") -> dict:
    """Set an alarm.

    Args:
        time: Time of day, HH:MM
        color: Color
    """
    return {"time": time, "color": color}
