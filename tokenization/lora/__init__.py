"""LoRA and DoRA adapters: PEFT folders that are whole and alike, and one form for the factors of a product."""
