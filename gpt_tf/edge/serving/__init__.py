"""A server of OpenAI's protocol over the scheduler: `gpt-tf serve`.

`server` opens models and listens, `app` has the routes, `protocol` what requests and
answers look like, `worker` the thread that computes for a model, `guard` what bounds a
request, `connection` what bounds a connection, `metrics` what is counted. It imports
the modules of `edge`, FastAPI and uvicorn, never TensorFlow or Keras. Start with `app`.
"""
