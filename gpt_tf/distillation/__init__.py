"""Article 3.3, knowledge distillation: a small GPT learns from a large one.

`distiller` is the Keras model that wraps teacher and student, `losses` what they are
compared by, `student` cuts a student from a teacher, `teacher_cache` stores what a
teacher predicts, `tokenizer_alignment` joins two vocabularies. Imports `models`; knows
neither quantisation nor parallel computation. Start with `distiller`.
"""
