"""The store on NVIDIA GPUs: pinned memory, loads by the GPU itself, the mailbox.

Imported only if MLX runs on CUDA.
"""
