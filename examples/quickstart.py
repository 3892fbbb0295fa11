"""Train a torchvision ResNet-18 on generated images, half of the steps with a sparse backward pass.

python examples/quickstart.py               # eager
python examples/quickstart.py --compile     # through torch.compile; needs a C++ compiler
"""

import sys
from pathlib import Path

import torch
import torchvision

import ssprop_fx

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
batch = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))  # stands in for your images
loader = [batch] * 9
criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

policy = ssprop_fx.Policy.load(Path(__file__).with_name("policy.yaml"))

if "--compile" in sys.argv:
    model = torch.compile(model, backend="ssprop", options={"policy": policy})
else:
    model = ssprop_fx.transform(model, policy)

for images, labels in loader:
    loss = criterion(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {policy.steps}: factor {policy.factor:g}, loss {loss.item():.3f}")
    policy.step()  # like a learning-rate scheduler

print(ssprop_fx.inspect(model))
