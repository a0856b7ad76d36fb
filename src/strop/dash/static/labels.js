// Labels of recipe fields and titles of curves.

import { h } from "./dom.js";

/** Titles of curves by the field of a step, filled from the server when the page opens. */
export const TITLES = {};

const LABELS = {
  "model.name": "Model",
  "model.quantization": "Base quantization",
  "data.train": "Training rows",
  "data.eval": "Evaluation rows",
  "data.bad_rows": "Invalid rows",
  "data.overlong": "Longer rows",
  "data.max_length": "Maximum row length in tokens",
  "lora.r": "Rank",
  "lora.target_modules": "Adapted layers",
  "train.batch_size": "Effective batch size in rows",
  "train.max_steps": "Maximum steps",
  "train.eval_steps": "Steps between evaluations",
  "train.max_time": "Maximum time",
  out: "Run folder",
  "model.revision": "Model revision",
  "model.adapter": "Adapter to start from",
  "model.double_quantization": "Double quantization",
  "model.resident_layers": "Layers kept dequantized",
  "model.placement": "Placement of the base",
  "model.dtype": "Data type of the base",
  "data.format": "Row format",
  "data.loss": "Tokens to train on",
  "data.template": "Chat template",
  "data.template_options": "Chat template options",
  "data.encoding": "Text encoding",
  "lora.alpha": "LoRA alpha",
  "lora.dropout": "LoRA dropout",
  "lora.bias": "Trained biases",
  "lora.use_rslora": "rsLoRA",
  "lora.use_dora": "DoRA",
  "lora.init": "LoRA initialization",
  "lora.rank_pattern": "Rank by module",
  "lora.alpha_pattern": "Alpha by module",
  "lora.modules_to_save": "Modules trained in full",
  "lora.vision": "Parts trained for images",
  "lora.new_tokens": "New tokens",
  "train.method": "Training method",
  "train.sft_weight": "SFT weight",
  "train.rewards": "Reward functions",
  "train.turns": "Maximum turns",
  "train.reward_timeout": "Maximum time of a reward",
  "train.group": "Completions per prompt",
  "train.answer_tokens": "Maximum completion length in tokens",
  "train.group_loss": "Averaging of token losses",
  "train.clip_low": "Lower clip range",
  "train.clip_high": "Upper clip range",
  "train.updates": "Optimizer steps per batch",
  "train.labels": "Classes",
  "train.pooling": "Vector of a text",
  "train.temperature": "Temperature of the loss",
  "train.vllm_python": "Python with vLLM",
  "train.keep": "Share of general prompts",
  "train.keep_prompts": "File of general prompts",
  "train.teacher_model": "Model of the teacher's server",
  "train.micro_batch": "Micro-batch in rows",
  "train.micro_batch_tokens": "Micro-batch in tokens",
  "train.lora_plus_ratio": "LoRA+ ratio",
  "train.lr_scheduler": "Learning rate schedule",
  "train.max_grad_norm": "Maximum gradient norm",
  "train.early_stopping": "Early stopping after evaluations",
  "train.samples": "Sample completions",
  "train.save_steps": "Steps between saves",
  "train.keep_checkpoints": "Checkpoints to keep",
  "train.log_steps": "Steps between logged steps",
  "train.exact": "Equal results on any number of devices",
  "train.deterministic": "Deterministic on a GPU",
  "train.int8_matmul": "Int8 matrix multiplications",
  "train.timeout": "Maximum wait for other devices",
  track: "Experiment trackers",
};

/** Return the label of a field: by default its last name in words. */
export function labelOfField(name) {
  const words = name.split(".").at(-1).replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

/** A column of tables of settings: fields by their labels, and the names that they have in commands and recipes. */
export const FIELD_COLUMN = {
  key: "field",
  name: "field",
  head: true,
  value: (row) => `${labelOfField(row.field)} ${row.field}`,
  csv: (row) => row.field,
  show: ({ field }) =>
    h("span", { style: { "text-align": "left" } }, labelOfField(field), h("code", { class: "name" }, field)),
};
