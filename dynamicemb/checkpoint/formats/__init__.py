"""Other formats: NVIDIA dynamicemb's dumps, Parquet, safetensors."""
