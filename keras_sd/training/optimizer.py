"""AdamW that keeps an exponential moving average (EMA) of the weights inside the compiled step."""

import keras
from keras import ops


class AdamW(keras.optimizers.AdamW):
    """AdamW (Loshchilov and Hutter, 2019) with EMA copies of the weights.

    The average decays by min(`ema_decay`, (1 + n) / (10 + n)) at update n, counted from 0: it follows a
    young run closely and smooths an old one. Keras' own `use_ema` starts from zeros and has a fixed decay.
    The average moves with each update, not with each accumulated micro-batch. An `ema_decay` of None makes
    no average.
    """

    def __init__(self, learning_rate, ema_decay=0.9999, name="adamw", **options):
        super().__init__(learning_rate, name=name, **options)
        self.ema_decay = ema_decay
        self.ema_variables = []

    def build(self, variables):
        """Makes the moments and the averages, which begin as exact copies of the weights."""
        if self.built:
            return
        super().build(variables)
        if self.ema_decay is None:
            return
        self.ema_variables = self.add_optimizer_variables(variables, "ema")
        for average, variable in zip(self.ema_variables, variables, strict=True):
            # A copy: JAX donates the buffers of both to the compiled step, so they may not be one.
            average.assign(ops.copy(variable))

    def _apply_weight_decay(self, variables):
        """Leaves the decay to the update: Keras traces the schedule anew for each variable here."""

    def _backend_update_step(self, gradients, variables, learning_rate):
        """One update of all variables (Kingma and Ba, 2015, algorithm 1 in the order of its section 2).

        What they share is computed once and each variable is read once: Keras traces both anew for each use,
        which takes most of the time to the first step of a small model.
        """
        update = ops.cast(self.iterations + 1, "float32")
        rate = ops.cast(learning_rate, "float32")
        step_size = rate * ops.sqrt(1.0 - self.beta_2**update) / (1.0 - self.beta_1**update)
        retained = 1.0 - rate * self.weight_decay
        first_share, second_share, epsilon = (
            ops.convert_to_tensor(number, "float32")
            for number in (1.0 - self.beta_1, 1.0 - self.beta_2, self.epsilon)
        )
        if self.ema_decay is not None:
            decay = ops.minimum(self.ema_decay, young_decay(ops.cast(self.iterations, "float32")))
            average_share = 1.0 - decay
        for gradient, variable in zip(gradients, variables, strict=True):
            index = self._get_variable_index(variable)
            momentum, velocity, weight = (
                ops.cast(values, "float32")  # reads it
                for values in (self._momentums[index], self._velocities[index], variable)
            )
            momentum = momentum + (gradient - momentum) * first_share
            velocity = velocity + (ops.square(gradient) - velocity) * second_share
            weight = weight * retained - momentum * step_size / (ops.sqrt(velocity) + epsilon)
            self._momentums[index].assign(momentum)
            self._velocities[index].assign(velocity)
            variable.assign(weight)
            if self.ema_decay is not None:
                average = ops.cast(self.ema_variables[index], "float32")
                self.ema_variables[index].assign(average - (average - weight) * average_share)


def young_decay(updates):
    """The largest decay of an average after that many updates: it forgets the start of a young run soon."""
    return (1.0 + updates) / (10.0 + updates)


class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """Counts a schedule's steps in updates when each takes several batches.

    Keras asks a schedule for the rate at the number of batches, also when gradients are accumulated.

    Args:
        schedule: the schedule over updates.
        batches: batches in one update.
    """

    def __init__(self, schedule, batches):
        super().__init__()
        self.schedule = schedule
        self.batches = batches

    def __call__(self, step):
        return self.schedule(step // self.batches)
