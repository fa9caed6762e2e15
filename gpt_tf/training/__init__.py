"""Training runs: settings, preparation, loop, checkpoints and exact resume.

`config` holds the settings and presets, `preparation` turns text into tokens and makes
the model to start from, `loop` trains, saves and resumes, `run_folder` says what a
run's folder holds. Imports the three methods, `models` and `text`. Start with `loop`.
"""
