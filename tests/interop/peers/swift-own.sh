# 2 * 40GiB
NPROC_PER_NODE=2 \
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
swift rlhf \
    --rlhf_type gkd \
    --model MODEL \
    --teacher_model MODEL \
    --tuner_type lora \
    --dataset 'CHAT#20' \
    --lmbda 1 \
    --beta 0.5 \
    --temperature 1.0 --top_p 1.0 \
    --max_length 256 \
    --max_completion_length 8 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1e-5 \
    --output_dir OUT \
    --use_vllm true --vllm_mode colocate \
    --attn_impl flash_attn
