"""Why a model predicts what it predicts, and whether the explanation is faithful.

`attribution` explains one next token (LIME, SHAP, attention, gradients),
`faithfulness` tests explanations by deleting what they call important. Imports
`evaluation`. Start with `attribution`.
"""

# Fewer explained prompts say nothing.
FEWEST_PROMPTS = 50
