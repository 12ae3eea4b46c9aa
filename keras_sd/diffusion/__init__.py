"""Diffusion: noise schedules, samplers and the sampling loop.

schedules          signal and noise rates of the training timesteps
prediction         the algebra of noise, velocity and sample predictions
spacing            the timesteps and noise levels of a sampler's steps
rows               a sampler's step as a table of weights, and the formulas that build it
samplers           the samplers by name
ddim               DDIM, DDPM, PLMS, LCM, TCD
k_diffusion        Euler, Heun, DPM2, DPM++ SDE, LMS
dpm_solver         DPM-Solver, DEIS, UniPC
denoiser           the sampling loop around one compiled step
guidance           classifier-free guidance
thresholding       clipping of predicted samples
scheduler_config   reads and writes `scheduler_config.json`; scheduler_options holds its rules
finite             stops NaN and infinity
"""
