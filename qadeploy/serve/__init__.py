"""Answers over HTTP: ``qadeploy serve``. No torch, no transformers; fastapi and uvicorn are used here only."""
