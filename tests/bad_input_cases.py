"""Bad input, by command: arguments, and a part of the error that they must cause.

`{bundled}`, `{packed}` and `{out}` stand for the bundled model, a conversion of it, and a missing
directory.
"""

GENERATE = [
    ("--max-tokens 0", "--max-tokens 0 is out of range. Give 1 or more, or -1 for no limit."),
    ("--max-tokens many", "argument --max-tokens/-m: invalid int value: 'many'"),
    ("--temp -0.5", "--temp -0.5 is out of range. Give 0 (the likeliest token) or more."),
    ("--temp nan", "--temp nan is out of range."),
    ("--top-p 1.5", "--top-p 1.5 is out of range. Give a probability from 0 to 1."),
    ("--min-p -1", "--min-p -1.0 is out of range."),
    ("--top-k -3", "--top-k -3 is out of range. Give 1 or more tokens, or 0 for all."),
    ("--top-k 9999999", "--top-k 9999999: the model has 4096 tokens. Give fewer."),
    ("--xtc-probability 2", "--xtc-probability 2.0 is out of range."),
    (
        "--xtc-threshold 0.7",
        "--xtc-threshold 0.7 is out of range. Give a probability from 0 to 0.5",
    ),
    ("--min-tokens-to-keep 0", "--min-tokens-to-keep 0 is out of range. Give 1 or more."),
    ("--seed -1", "--seed -1 is out of range. Give a whole number from 0 to 18446744073709551615."),
    ("--seed 18446744073709551616", "--seed 18446744073709551616 is out of range."),
    ("--max-kv-size 0", "--max-kv-size 0 is out of range. Give 8 or more tokens"),
    (
        "--max-kv-size 64 --kv-bits 4",
        "--max-kv-size 64 cannot be combined with --kv-bits. Leave one of them out.",
    ),
    (
        "--max-kv-size 64 --prompt-cache-file {out}.safetensors",
        "--max-kv-size 64 cannot be combined with --prompt-cache-file.",
    ),
    ("--prefill-step-size 0", "--prefill-step-size 0 is out of range. Give 1 or more tokens."),
    ("--kv-bits 7", "--kv-bits 7 is out of range. Give 2, 3, 4, 5, 6 or 8."),
    ("--kv-bits 4 --kv-group-size 48", "--kv-group-size 48 is out of range. Give 32, 64 or 128."),
    ("--kv-bits 8 --quantized-kv-start -1", "--quantized-kv-start -1 is out of range."),
    ("--extra-eos-token <nosuch>", "--extra-eos-token '<nosuch>': not in the model's vocabulary."),
    ("--chat-template-config {", "--chat-template-config {: not JSON ("),
    ("--chat-template-config [1]", "--chat-template-config [1]: not an object."),
    ('--chat-template-config {"messages":1}', "the chat template fails with --chat-template-conf"),
    ("--prompt-cache-file {out}.safetensors", "out.safetensors: missing (No such file or dire"),
    ("--prompt-cache-file {bundled}/model.safetensors", "cannot be read as a prompt cache ("),
    (
        "--adapter-path {out}",
        "out: has no adapter_config.json. Give a directory that mlx_lm.lora",
    ),
    ("--adapter-path {bundled}", "bundled: has no adapter_config.json."),
    ("--prompt= --ignore-chat-template", "--prompt is empty and no chat template applies."),
    ("--quantize-activations", "--quantize-activations is not supported for streamed models;"),
    ("--draft-model x", "--draft-model is not supported for streamed models; leave it out."),
    ("--image x.png", "--image is not supported for streamed models; leave it out."),
    ("--model=", "--model is empty. Give a directory, or a name on the Hub."),
    ("--model {out}", "out: no such directory. Give a model's directory, or its name on the Hug"),
    ("--model ./outt", "outt: no such directory. Give a model's directory, or its name on the H"),
    ("--model ~/no-such-model", "no-such-model: no such directory. Give a model's directory, or"),
    ("--model models/qwen", "models/qwen: not a directory here. The Hugging Face Hub did not deli"),
    (
        "--model {bundled}x",
        "bundledx: no such directory. Did you mean {bundled}? Give a model's directory, or its",
    ),
    ("--prompt \udcff", "--prompt: byte 0xff after 0 characters is not UTF-8. Give UTF-8."),
    ("--system-prompt caf\udce9", "--system-prompt: byte 0xe9 after 3 characters is not UTF-8."),
    ("--extra-eos-token \udcff", "--extra-eos-token: byte 0xff after 0 characters is not UTF-8."),
    (
        "--model {bundled}/config.json",
        "config.json: no config.json. Give the directory of a model.",
    ),
    ("--expert-cache lots", "expert_cache = 'lots' is not a size. Write bytes or a unit, such as"),
    (
        "--expert-cache 12",
        "expert_cache = 12 bytes holds 0 experts per layer, but each token uses 4",
    ),
    (
        "--expert-cache 900GiB",
        "expert_cache = 966367641600 bytes is more than the ",
    ),
    ("--io-threads 0", "io_threads = '0' is not a whole number of at least 1."),
    ("--io-threads 4096", "io_threads = 4096 is too many. Give at most 1024."),
    ("--io-mode fast", "io_mode = 'fast' is not one of auto, buffered, direct."),
    (
        "--verify-reads --model {bundled}",
        "bundled is not a converted model, so its experts have no checksums. Convert it",
    ),
    (
        "--experts-per-token 101",
        "experts_per_token = 101, but the model has 100 experts per layer.",
    ),
    ("--experts-per-token 1.5", "experts_per_token = '1.5' is not a whole number of at least 1."),
    ("--experts-per-token", "argument --experts-per-token: expected one argument"),
    ("--expert-cash 1GiB", "unrecognized arguments: --expert-cash"),
]

CONVERT = [
    ("", "the following arguments are required: --hf-path/--model"),
    ("--hf-path {out}", "out: not a directory. Give a checkpoint's directory, or its name on the"),
    ("--hf-path {bundled}/config.json", "config.json: not a directory. Give a checkpoint's direc"),
    ("--hf-path {bundled} --mlx-path {packed}", "packed: exists already. Delete it, or give"),
    (
        "--hf-path {bundled} --mlx-path {packed}/config.json/x",
        "cannot be written (Not a directory)",
    ),
    ("--hf-path {bundled} --mlx-path {out} -q --q-bits 7", "--q-bits 7: expected one of 2, 3, 4,"),
    (
        "--hf-path {bundled} --mlx-path {out} -q --q-bits four",
        "argument --q-bits: invalid int valu",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} -q --q-group-size 48",
        "--q-group-size 48: expected one",
    ),
    ("--hf-path {bundled} --mlx-path {out} -q --q-method best", "argument --q-method: invalid cho"),
    (
        "--hf-path {bundled} --mlx-path {out} -q --calibrate {out}",
        "out: cannot be read as a text (",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --dtype int8",
        "argument --dtype: invalid choice: 'int8'",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --dtype float16",
        "--dtype float16: the source keeps its",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --revision x",
        "--revision x has no effect on the local",
    ),
    ("--hf-path {bundled} --mlx-path {out} --link -q", "--link copies nothing, so -q and --dtype"),
    (
        "--hf-path {packed} --mlx-path {out} --link",
        "--link needs an MLX checkpoint with stacked exp",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --upload-repo a/b/c",
        "--upload-repo a/b/c: not the name of a repository. Give OWNER/NAME, of letters, digits, a",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --upload-repo owner/na--me",
        "--upload-repo owner/na--me: not the name of a repository.",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --upload-repo name",
        "--upload-repo name: not the name of a repository. Give OWNER/NAME",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --link --upload-repo a/b",
        "--upload-repo a/b: --link makes symlinks to files of this machine, which cannot be uplo",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --upload-repo a/b",
        "--upload-repo a/b: who may see it? Add --private (you, or your organization) or --public",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --upload-repo a/b --private --public",
        "argument --public: not allowed with argument --private",
    ),
    (
        "--hf-path {bundled} --mlx-path {out} --private",
        "--private and --public have no effect without --upload-repo.",
    ),
    ("verify", "the following arguments are required: DIR"),
    ("verify {out}", "out: not a directory. Give one that flashmoe-convert wrote."),
    (
        "verify {bundled}",
        "bundled: not written by flashmoe-convert (no model_experts). Convert it f",
    ),
    (
        "verify {packed} --repair",
        "--repair and --hf-path SOURCE go together. Give both, or neither.",
    ),
    ("verify {packed} --hf-path x", "--repair and --hf-path SOURCE go together."),
]

BENCH = [
    ("", "the following arguments are required: WHAT"),
    ("speed", "argument WHAT: invalid choice: 'speed'"),
    ("io --record 5000", "--record must be a multiple of 12288, at least 36864, to"),
    ("io --threads 0", "--threads must be at least 1, got 0"),
    ("io --sample-mib 0", "--sample-mib must be at least 1, got 0"),
    ("io --sample-mib 999999999", "1999999998 MiB are needed, and "),
    ("io --rounds -1", "--rounds must be at least 1, got -1"),
    (
        "io --dir {bundled}/config.json",
        "config.json: cannot be written (File exists). Give another",
    ),
    (
        "io --model {bundled}/config.json",
        "config.json: no config.json. Give the directory of a mod",
    ),
    ("decode --geometry 9b", "argument --geometry: invalid choice: '9b'"),
    ("decode --layers 0", "layers must be from 2 to 1000, got 0"),
    ("decode --layers 100000", "layers must be from 2 to 1000, got 100000"),
    ("decode --vocabulary 0", "vocabulary must be from 259 to 10000000, got 0"),
    ("decode --bits 3", "bits must be 4 or 2, got 3"),
    ("decode --tokens 0", "--tokens must be at least 1, got 0"),
    ("decode --runs 0", "--runs must be at least 1, got 0"),
    ("decode --plot {out}/x.png", "out is not a directory."),
    ("decode --plot x.gifs", "--plot x.gifs: not an image file. Use .png, .svg, .pdf."),
    ("prefill --chunk 0", "--chunk must be at least 1, got 0"),
    ("batch --batch 0", "--batch must be at least 1, got 0"),
    ("kernels --op sum", "--op must be one of dequant_matvec"),
    ("kernels --bits 7", "--bits must be one of 2, 4, 8, got 7"),
    ("kernels --top-k 0", "--top-k must be from 1 to 32, got 0"),
    ("kernels --dtype int8", "argument --dtype: invalid choice: 'int8'"),
]

DOCTOR = [
    ("{out}", "out: not a directory. Give the directory of a model."),
    ("{bundled}/config.json", "config.json: not a directory. Give the directory of a model."),
    ("--geometry 9b", "argument --geometry: invalid choice: '9b'"),
    ("--sample-mib 1", "--sample-mib must be at least 2, the size of one expert, got 1"),
]

PLAN = [
    ("--bits 4", "--model is missing. Give 397b, 122b, 35b, gpt-oss-120b, "),
    ("--model 397b", "missing --ram and --ssd and --memory-bandwidth. Give the figures, or a"),
    ("--model 1b --machine m3-max-48", "--model 1b: has no config.json. Give 397b, 122b, 35b,"),
    ("--model 397b --machine pdp-11", "--machine pdp-11 is unknown. Choose from m1-pro-16"),
    ("--model 397b --machine m3-max-48 --bits 3", "--bits 3 is unknown. Choose from 4, 2."),
    ("--model 397b --machine m3-max-48 --top-k 0", "--top-k = 0, but the model has 512 experts"),
    ("--model 397b --machine m3-max-48 --ram much", "--ram much is not a size. Give bytes or a un"),
    (
        "--model 397b --machine m3-max-48 --ram 1GB",
        "--ram 1 GB is too small: trunk, one token's experts and the",
    ),
    ("--model 397b --machine m3-max-48 --ssd 0", "--ssd must be greater than 0 (GB/s), got 0"),
    ("--model 397b --machine m3-max-48 --ssd nan", "--ssd must be greater than 0 (GB/s), got nan"),
    (
        "--model 397b --machine m3-max-48 --cache 900GB",
        "--cache must be from 4.25 GB (one token's ex",
    ),
    ("--model 397b --machine m3-max-48 --cache auto", "--cache auto is not a size."),
    ("--model 397b --machine m3-max-48 --prompt 0", "--prompt must be at least 1 (token), got 0"),
    ("--model 397b --machine m3-max-48 --engine x", "--engine x is unknown. Choose from"),
]

VARIABLES = [
    ("EXPERT_CACHE", "lots", "FLASHMOE_EXPERT_CACHE = 'lots' is not a size."),
    ("IO_THREADS", "-2", "FLASHMOE_IO_THREADS = '-2' is not a whole number of at least 1."),
    ("IO_MODE", "fast", "FLASHMOE_IO_MODE = 'fast' is not one of auto, buffered, direct."),
    (
        "EXPERTS_PER_TOKEN",
        "101",
        "experts_per_token = 101, but the model has 100 experts per layer",
    ),
    ("VERIFY", "all", "FLASHMOE_VERIFY = 'all' must be 1 or 0."),
    (
        "EXPERT_CASHE",
        "2GiB",
        "FLASHMOE_EXPERT_CASHE: no environment variable of flashmoe-mlx has this name. Did you "
        "mean FLASHMOE_EXPERT_CACHE? Otherwise unset it.",
    ),
    ("KERNEL", "stock", "Did you mean FLASHMOE_KERNELS?"),
    ("STATS", "perhaps", "FLASHMOE_STATS = 'perhaps' must be 1 or 0."),
]

# Entries of config.json, in its text_config or on the top level; None removes one.
CONFIG = [
    ("text", {"hidden_size": "192"}, "hidden_size = '192' is not a whole number of at least 1."),
    (
        "text",
        {"num_hidden_layers": 0},
        "num_hidden_layers = 0 is not a whole number of at least 1.",
    ),
    ("text", {"num_attention_heads": 2.5}, "num_attention_heads = 2.5 is not a whole number"),
    ("text", {"full_attention_interval": 0}, "full_attention_interval = 0 is not a whole number"),
    ("text", {"rms_norm_eps": "x"}, "rms_norm_eps = 'x' is not a number above 0."),
    ("text", {"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes' is not true or false."),
    ("text", {"layer_types": "all"}, "layer_types = 'all' is not a list."),
    ("text", {"rope_parameters": [1]}, "rope_parameters = [1] is not an object."),
    ("text", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x' is not a number above 0."),
    (
        "text",
        {"rope_parameters": {"rope_theta": 1, "partial_rotary_factor": 2}},
        "partial_rotary_factor = 2 is more than the whole head.",
    ),
    ("text", {"num_experts": None}, "config.json: no num_experts. Restore the checkpoint's own"),
    ("text", {"num_experts": 50}, "has shape [100, 64, 48], expected 50 experts x rows x columns."),
    ("text", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0 is not a whole number of at"),
    (
        "text",
        {"moe_intermediate_size": 96},
        "biases BF16[64, 3] is not a matrix of 96 x 192, as config.json has it, in a format of",
    ),
    (
        "text",
        {"vocab_size": 7},
        "embed_tokens.biases is BF16[4096, 3], expected [7, 3] of BF16 or F16 or F32 by",
    ),
    (
        "text",
        {"num_hidden_layers": 3, "layer_types": None},
        "language_model.model.layers.3.input_layernorm.weight is not in the model that config.json",
    ),
    ("top", {"text_config": [1]}, "text_config = [1] is not a JSON object."),
    ("top", {"quantization": "4-bit"}, "quantization = '4-bit' is not an object."),
    (
        "top",
        {"model_type": "qwen3_moe"},
        "config.json: a model that cannot be built (TypeError",
    ),
    ("top", {"model_type": None}, "config.json: model_type = None is not a name."),
    ("top", {"flashmoe": [1]}, "flashmoe = [1] is not an object."),
    ("top", {"flashmoe": {"expert_cach": 1}}, '"flashmoe": unknown setting expert_cach. Choo'),
    ("top", {"flashmoe": {"expert_cache": "x"}}, "expert_cache = 'x' is not a size."),
    ("top", {"flashmoe": {"io_threads": -1}}, '"flashmoe": io_threads = -1 is not a whole number'),
    ("top", {"flashmoe": {"io_mode": 3}}, '"flashmoe": io_mode = 3 is not one of auto, buffered'),
    ("top", {"flashmoe": {"verify": 2}}, '"flashmoe": verify = 2 must be 1 or 0.'),
    (
        "top",
        {"flashmoe": {"verify": True}},
        "is not a converted model, so its experts have no checksums.",
    ),
    ("top", {"flashmoe": {"stats": "maybe"}}, "\"flashmoe\": stats = 'maybe' must be 1 or 0."),
]
