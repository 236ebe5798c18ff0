"""Stream Qwen3.5 mixture-of-experts models from disk inside MLX and mlx-lm."""
