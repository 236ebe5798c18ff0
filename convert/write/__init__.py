"""Execute the plan: complete files or none, in an order that needs little disk."""
