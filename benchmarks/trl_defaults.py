"""TRL's SFTTrainer as a beginner starts it, on a CPU. A peer of train_step.py.

python trl_defaults.py MODEL_FOLDER DATA.jsonl OUT_FOLDER          its defaults; `use_cpu` is the one change
python trl_defaults.py MODEL_FOLDER DATA.jsonl OUT_FOLDER 4bit     the usual QLoRA lesson, in bf16
"""

import json
import sys
import time
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

model, data, out, *quantized = sys.argv[1:]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.started


if quantized:
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)
more = {"optim": "paged_adamw_8bit", "learning_rate": 2e-4, "bf16": True} if quantized else {}
clock = Clock()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        use_cpu=True,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **more,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
    callbacks=[clock],
)
step, real = trainer.training_step, 0


def counted(module: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
    global real
    real += int(inputs["attention_mask"].sum())
    return step(module, inputs, *rest, **more)


trainer.training_step = counted
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"tokens": real, "seconds": clock.seconds, "loss": sum(losses) / len(losses)}))
