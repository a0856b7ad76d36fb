from datasets import load_dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

train = load_dataset("json", data_files="JUDGED", split="train")
test = load_dataset("json", data_files="JUDGED", split="train")
args = KTOConfig("OUT", desirable_weight=1.5, per_device_train_batch_size=4, learning_rate=1e-5, warmup_steps=2, seed=9)
trainer = KTOTrainer(
    model="MODEL", args=args, train_dataset=train, eval_dataset=test, peft_config=LoraConfig(r=8, use_dora=False)
)
trainer.train()
