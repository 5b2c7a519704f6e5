"""Flags of other trainers → what to do here."""

ELSEWHERE = {
    "with_prior_preservation": "the prior term is on with a --class_prompt, and "
    "--prior_loss_weight 0 switches it off",
    **dict.fromkeys(("lora_rank", "network_dim"), "give --method lora and --rank"),
    "network_alpha": "give --lora_alpha",
    **dict.fromkeys(("use_lora", "network_module"), "give --method lora"),
    **dict.fromkeys(
        ("num_train_epochs", "max_train_epochs", "epochs"), "--max_train_steps counts updates"
    ),
    **dict.fromkeys(
        ("save_every_n_steps", "save_every_n_epochs", "save_steps", "save_interval"),
        "--checkpointing_steps counts the updates between two snapshots",
    ),
    "validation_epochs": "--validation_steps counts the updates between two grids",
    "train_data_dir": "give --instance_data_dir",
    "reg_data_dir": "give --class_data_dir",
    "output_name": "files are named after --output_dir",
    "enable_xformers_memory_efficient_attention": "attention saves memory by itself",
    "xformers": "attention saves memory by itself",
    "pre_compute_text_embeddings": "prompts are encoded once by themselves",
    "push_to_hub": "nothing is uploaded: hf upload does it",
}
