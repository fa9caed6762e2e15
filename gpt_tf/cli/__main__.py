"""`python -m gpt_tf.cli`, the same as `gpt-tf`."""

from gpt_tf.cli import main

if __name__ == "__main__":
    main()
