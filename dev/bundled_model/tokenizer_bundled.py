"""The bundled tokenizer as it stands in tokenizer.json.

transformers gives every qwen3_5_moe checkpoint Qwen's own word splitting unless tokenizer_config
names a class of its own; this model was trained with another splitting.
"""

from transformers import PreTrainedTokenizerFast


class BundledTokenizer(PreTrainedTokenizerFast):
    """PreTrainedTokenizerFast, unchanged."""
