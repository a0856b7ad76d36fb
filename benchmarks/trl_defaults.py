"""TRL's SFTTrainer with its defaults, as a beginner starts it; `use_cpu` is the one change. A peer of train_step.py.

python trl_defaults.py MODEL_FOLDER DATA.jsonl OUT_FOLDER
"""

import json
import sys
import time
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

model, data, out = sys.argv[1:]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.started


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
