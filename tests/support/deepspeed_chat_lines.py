"""Flags and command lines of DeepSpeed-Chat's scripts (as of February 2025), for the tests of their translation."""

# Each script's flags, with a value that is neither DeepSpeed-Chat's default nor ours (where there is one to choose).
DEEPSPEED = "--deepspeed --deepspeed_config c.json --deepscale --deepscale_config c.json --local_rank 0"
STEP = f"""{DEEPSPEED} --data_path a b --data_split 6,2,2 --data_output_path data --num_train_epochs 2
  --gradient_accumulation_steps 4 --lr_scheduler_type linear --num_warmup_steps 7 --output_dir out --seed 7 --offload
  --dtype bf16 --only_optimize_lora --compute_fp32_loss --enable_tensorboard --tensorboard_path tb --add_eot_token"""
SUPERVISED = f"""{STEP} --model_name_or_path m --per_device_train_batch_size 3 --per_device_eval_batch_size 3
  --max_seq_len 99 --learning_rate 1e-4 --weight_decay 0.1 --gradient_checkpointing --dropout 0.0 --zero_stage 2
  --lora_dim 8 --lora_module_name decoder.layers. --lora_learning_rate 2e-4"""
SCRIPTS = {
    "step1 main.py": ("sft", f"{SUPERVISED} --sft_only_data_path c --eot_token <|endoftext|> --print_loss"),
    "step2 main.py": ("reward", f"{SUPERVISED} --num_padding_at_beginning 1 --eval_interval 9 --eval_iters 9"),
    "step2_dpo main.py": (
        "dpo",
        f"{SUPERVISED} --beta 0.2 --label_smoothing 0.1 --offload_reference_model --print_loss",
    ),
    "step3 main.py": (
        "ppo",
        f"""{STEP} --unsupervised_dataset_name w --unsupervised_dataset_config_name raw --unsup_coef 3
  --actor_model_name_or_path m --critic_model_name_or_path r --num_padding_at_beginning 1
  --per_device_generation_batch_size 8 --per_device_training_batch_size 2 --generation_batches 2 --ppo_epochs 2
  --max_prompt_seq_len 99 --max_answer_seq_len 99 --actor_learning_rate 1e-4 --critic_learning_rate 1e-4
  --actor_weight_decay 0.1 --critic_weight_decay 0.1 --preprocessing_num_workers 2 --enable_hybrid_engine
  --unpin_actor_parameters --release_inference_cache --inference_tp_size 2 --tp_gather_partition_size 4
  --offload_reference_model --offload_reward_model --actor_zero_stage 2 --critic_zero_stage 2
  --actor_gradient_checkpointing --critic_gradient_checkpointing --actor_dropout 0.0 --critic_dropout 0.0
  --actor_lora_dim 8 --actor_lora_module_name decoder.layers. --critic_lora_dim 8
  --critic_lora_module_name decoder.layers. --actor_lora_learning_rate 2e-4 --critic_lora_learning_rate 2e-4
  --enable_ema --enable_mixed_precision_lora --align_overflow --print_answers --print_answers_interval 9
  --enable_test_mode --test_stop_step 9""",
    ),
    "e2e_rlhf.py": (
        "rlhf",
        """--step 1 2 --actor-model 1.3b --reward-model 350m --actor-zero-stage 2 --reward-zero-stage 2
  --output-dir out --deployment-type single_node""",
    ),
    "chat.py": ("chat", "--path m --max_new_tokens 99"),
    "prompt_eval.py": (
        "eval",
        """--model_name_or_path_baseline a --model_name_or_path_finetune b --num_beams 1 --num_beam_groups 1 --top_k 3
  --penalty_alpha 0.6 --num_return_sequences 2 --max_new_tokens 99 --language Chinese --add_eot_token""",
    ),
    "rw_eval.py": ("eval", "--model_name_or_path r --num_padding_at_beginning 1 --add_eot_token"),
}
# What a command, or a flag, does not go without.
NEEDED = {"chat": "--model m0", "eval": "--models m0 --data_path demo --temperature 0.5"}
COMPANIONS = {
    "lora_module_name": "--lora_dim 8",
    "lora_learning_rate": "--lora_dim 8",
    "actor_lora_module_name": "--lora_dim 8",
    "actor_lora_learning_rate": "--lora_dim 8",
    "critic_lora_module_name": "--critic_lora_dim 8",
    "critic_lora_learning_rate": "--critic_lora_dim 8",
    "unsupervised_dataset_name": "--unsup_coef 3",
    "unsupervised_dataset_config_name": "--unsup_coef 3 --unsupervised_dataset_name w",
    "unsup_coef": "--unsupervised_dataset_name w",
    "per_device_generation_batch_size": "--per_device_training_batch_size 2 --gradient_accumulation_steps 8",
    "enable_test_mode": "--test_stop_step 9",
    "test_stop_step": "--enable_test_mode",
}

# Lines of its training scripts, each with our recipe and command for it.
FOUR = "Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets"
COMMON = "--num_train_epochs 1 --lr_scheduler_type cosine --deepspeed --seed 1234 --output_dir out --data_split 2,4,4"
STEP_3 = f"""{COMMON} --data_path Dahoas/rm-static --actor_model_name_or_path a --critic_model_name_or_path r
  --num_padding_at_beginning 1 --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 --max_prompt_seq_len 256
  --num_warmup_steps 100 --actor_dropout 0.0 --enable_hybrid_engine --critic_learning_rate 5e-6"""
BOTH_STEP_3 = "--per_device_generation_batch_size {0} --per_device_training_batch_size {0}"
ADAPTERS = "--actor_lora_dim 128 --actor_lora_module_name decoder.layers."
LLAMA_STEP_3 = f"""{STEP_3} {BOTH_STEP_3.format(1)} --actor_learning_rate 9.65e-6 --actor_weight_decay 0.1
  --critic_weight_decay 0.1 --gradient_accumulation_steps 1 --actor_gradient_checkpointing
  --critic_gradient_checkpointing --offload_reference_model --actor_zero_stage 3 --critic_zero_stage 3"""
SUPERVISED_STEP = f"{COMMON} --max_seq_len 512 --num_warmup_steps 0 --gradient_accumulation_steps 1"
LINES = [
    (
        "opt-1.3b sft",
        """--model_name_or_path m --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0 --enable_tensorboard
        --tensorboard_path out --deepspeed --output_dir out""",
    ),
    (
        "opt-1.3b-node sft",
        f"""{SUPERVISED_STEP} --data_path {FOUR} --model_name_or_path m --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 16
        --zero_stage 2""",
    ),
    (
        "opt-66b-64 sft",
        f"""{SUPERVISED_STEP} --data_path {FOUR} --model_name_or_path m --per_device_train_batch_size 4
        --per_device_eval_batch_size 4 --learning_rate 1e-4 --weight_decay 0.1 --num_train_epochs 2
        --gradient_checkpointing --zero_stage 3 --lora_dim 128 --lora_module_name decoder.layers.""",
    ),
    (
        "opt-1.3b reward",
        """--model_name_or_path m --num_padding_at_beginning 1 --weight_decay 0.1 --dropout 0.0
        --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard --tensorboard_path out --deepspeed
        --output_dir out""",
    ),
    (
        "opt-66b-64 reward",
        f"""{SUPERVISED_STEP} --data_path {FOUR} --model_name_or_path m --num_padding_at_beginning 1
        --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --learning_rate 5e-5 --weight_decay 0.1
        --dropout 0.0 --zero_stage 0""",
    ),
    (
        "llama-2-7b-node reward",
        f"""{SUPERVISED_STEP} --data_path Dahoas/rm-static --model_name_or_path m --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --learning_rate 9.65e-6 --weight_decay 0.1 --num_padding_at_beginning 0
        --gradient_checkpointing --zero_stage 3 --offload""",
    ),
    (
        "llama-2-7b-lora-dpo-node dpo",
        f"""{SUPERVISED_STEP} --data_path Dahoas/rm-static --model_name_or_path m --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --learning_rate 9.65e-6 --weight_decay 0.1 --gradient_checkpointing
        --zero_stage 3 --offload --lora_dim 128 --lora_module_name layers.""",
    ),
    (
        "bloom-1b1-chinese-node sft",
        """--data_path wangrui6/Zhihu-KOL Cohere/miracl-zh-queries-22-12 Hello-SimpleAI/HC3-Chinese mkqa-Chinese
        --data_split 10,0,0 --model_name_or_path bigscience/bloom-1b1 --per_device_train_batch_size 8
        --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0. --num_train_epochs 16
        --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --zero_stage 2
        --deepspeed --output_dir out""",
    ),
    (
        "opt-1.3b ppo",
        """--actor_model_name_or_path a --critic_model_name_or_path r --actor_zero_stage 0 --critic_zero_stage 0
        --num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128
        --enable_hybrid_engine --actor_gradient_checkpointing --actor_dropout 0.0 --output_dir out""",
    ),
    (
        "opt-6.7b-lora ppo",
        f"""{STEP_3} {BOTH_STEP_3.format(8)} --actor_learning_rate 5e-4 --gradient_accumulation_steps 16
        --actor_zero_stage 0 --critic_zero_stage 0 --actor_lora_dim 128 --actor_gradient_checkpointing
        --critic_gradient_checkpointing""",
    ),
    (
        "opt-1.3b-node ppo",
        f"""{STEP_3} {BOTH_STEP_3.format(4)} --actor_learning_rate 9.65e-6 --gradient_accumulation_steps 1
        --actor_zero_stage 2 --critic_zero_stage 2 --enable_ema --enable_tensorboard --tensorboard_path out""",
    ),
    (
        "opt-6.7b-node ppo",
        f"""{STEP_3} {BOTH_STEP_3.format(4)} --actor_learning_rate 9.65e-6 --actor_weight_decay 0.1
        --critic_weight_decay 0.1 --gradient_accumulation_steps 1 --actor_gradient_checkpointing
        --actor_zero_stage 3 --critic_zero_stage 3""",
    ),
    (
        "opt-13b-node ppo",
        f"""{STEP_3} {BOTH_STEP_3.format(16)} --actor_learning_rate 5e-4 --gradient_accumulation_steps 1
        --inference_tp_size 2 --actor_zero_stage 3 --critic_zero_stage 3 --actor_gradient_checkpointing {ADAPTERS}""",
    ),
    (
        "opt-66b-64 ppo",
        f"""{STEP_3} {BOTH_STEP_3.format(4)} --actor_learning_rate 5e-4 --actor_weight_decay 0.1
        --critic_weight_decay 0.1 --gradient_accumulation_steps 1 --inference_tp_size 8 --tp_gather_partition_size 4
        --actor_zero_stage 3 --critic_zero_stage 3 --actor_gradient_checkpointing {ADAPTERS}""",
    ),
    ("llama-2-7b-node ppo", LLAMA_STEP_3),
    (
        "llama-2-7b-lora-node ppo",
        f"""{LLAMA_STEP_3} --actor_lora_dim 64 --critic_lora_dim 64 --critic_lora_module_name layers.
        --actor_lora_module_name layers.""",
    ),
]
