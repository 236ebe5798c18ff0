"""The store on NVIDIA GPUs: pinned memory, experts that the GPU fetches itself, the mailbox.

Imported only where MLX runs on CUDA.
"""
