swift sft --model MODEL --dataset CHAT QA \
    --system 'You are helpful.' --loss_scale last_round \
    --max_length 256 --max_steps 20 --learning_rate=1e-4 \
    --lora_rank 4 --target_modules q_proj v_proj --output_dir OUT
