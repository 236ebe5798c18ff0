"""Write what was planned: whole files or none, in an order that needs little disk."""
