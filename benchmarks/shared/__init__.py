"""What several programs use: load, servers, prompts, tables, and what is measured on."""
