"""The model card, and the upload of a converted directory to the Hub."""
