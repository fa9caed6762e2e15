"""Article 3.3, knowledge distillation: a small GPT learns from a large one.

`distiller` is the Keras model that wraps teacher and student, `losses` what they are
compared by, `student` cuts a student from a teacher, `teacher_cache` stores what a
teacher predicts as `top_k` log-probabilities, `generated_text` is what models generate
to learn from, `tokenizer_alignment` joins two vocabularies. Imports `models`; knows
neither quantisation nor parallel computation. Start with `distiller`.
"""
