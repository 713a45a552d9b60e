"""Fine-tuning of LoRA adapters with torch and peft."""
