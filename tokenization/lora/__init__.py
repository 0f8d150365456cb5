"""LoRA and DoRA adapters: PEFT folders and the one form of their factors."""
