"""`python -m grpo_cli` is the `countdown` command."""

from grpo_cli.cli.app import main

if __name__ == "__main__":
    main()
